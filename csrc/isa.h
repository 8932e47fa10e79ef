// Which instruction sets this machine runs, and which one the kernels take.
#pragma once

#include <string>
#include <vector>

namespace correctnet {

// From the one that runs everywhere to the best. Each kernel is compiled once for each (cpu/, one file an instruction set).
enum class Isa { portable, avx2, avx512, avx512bf16, amx };

const char* name(Isa isa);

// What the kernels were compiled for; ascending.
std::vector<Isa> built_isas();

// By processor and operating system; ascending, the first is `portable`.
std::vector<Isa> supported_isas();

// The best supported one, or the one that the environment variable CORRECTNET_ISA names when this is first called.
// Throws std::runtime_error, at every call, if the variable names none or one that the machine lacks.
Isa selected_isa();

// Takes another one from now on; for tests. Throws std::runtime_error as above.
void select_isa(const std::string& name);

}  // namespace correctnet
