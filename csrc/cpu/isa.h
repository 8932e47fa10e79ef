// Instruction-set dispatch: which instruction sets this machine supports, and which one the kernels use.
#pragma once

#include <string>
#include <vector>

namespace correctnet {

// In ascending order. The files in cpu/isa are compiled once for each.
enum class Isa { portable, avx2, avx512, avx512bf16, amx };

const char* name(Isa isa);

// Instruction sets that the kernels were compiled for, ascending.
std::vector<Isa> built_isas();

// Instruction sets supported by processor and operating system, ascending; the first is `portable`.
std::vector<Isa> supported_isas();

// The best supported one, or the one named by the environment variable CORRECTNET_ISA at the first call. Every call
// throws std::runtime_error if the variable names an unknown or unsupported one.
Isa selected_isa();

// Selects another one; for tests. Throws std::runtime_error as above.
void select_isa(const std::string& name);

}  // namespace correctnet
