#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>

#if defined(CORRECTNET_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace correctnet {
namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::amx};

#if defined(CORRECTNET_X86)

// Tiles need support by the processor and, on Linux, permission for the process (arch_prctl).
bool amx_bfloat16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if ((d & (kBfloat16 | kTile)) != (kBfloat16 | kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool supported(Isa isa) {
  __builtin_cpu_init();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:  // x86-64-v4
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    case Isa::avx512bf16:
      return supported(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx:
      return supported(Isa::avx512bf16) && amx_bfloat16();
  }
  return false;
}

#else

bool supported(Isa isa) { return isa == Isa::portable; }

#endif

Isa parse(const std::string& text) {
  std::string names;
  for (const Isa isa : supported_isas()) {
    if (text == name(isa)) return isa;
    names += (names.empty() ? "" : ", ") + std::string(name(isa));
  }
  throw std::runtime_error("instruction set '" + text + "' is unknown or not available here; this machine has " + names);
}

Isa initial() {
  const char* forced = std::getenv("CORRECTNET_ISA");
  if (!forced || !*forced) return supported_isas().back();
  try {
    return parse(forced);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("CORRECTNET_ISA: ") + error.what());
  }
}

std::atomic<Isa>& selection() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::amx: return "amx";
  }
  return "";
}

std::vector<Isa> built_isas() {
#if defined(CORRECTNET_X86)
  return {std::begin(kAll), std::end(kAll)};
#else
  return {Isa::portable};
#endif
}

std::vector<Isa> supported_isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
    for (const Isa isa : kAll)
      if (supported(isa)) list.push_back(isa);
    return list;
  }();
  return all;
}

Isa selected_isa() { return selection(); }

void select_isa(const std::string& name) { selection() = parse(name); }

}  // namespace correctnet
