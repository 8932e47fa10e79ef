#include "cpu/kernels.h"

namespace correctnet {

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(CORRECTNET_X86)
    case Isa::avx2: return kernels_avx2;
    case Isa::avx512: return kernels_avx512;
    case Isa::avx512bf16: return kernels_avx512bf16;
    case Isa::amx: return kernels_amx;
#endif
    default: return kernels_portable;
  }
}

}  // namespace correctnet
