// What the tests of the kernels share: checks, and the kernels that this machine can run.
#pragma once

#include <vector>

#include "../engine.h"
#include "check.h"

// One table for each instruction set that this machine has, and AMX as modelled in C++ (amx_tile.h).
inline std::vector<const correctnet::Kernels*> available() {
  std::vector<const correctnet::Kernels*> all = {&correctnet::kernels_amx_model};
  for (const correctnet::Isa isa : correctnet::supported_isas()) all.push_back(&correctnet::kernels(isa));
  return all;
}
