// AVX-512 F, BW, DQ and VL (-march=x86-64-v4).
#include "../table.h"

namespace correctnet {

const Kernels kernels_avx512 = {"avx512", {type_kernels<Float>(), type_kernels<Bfloat16>()}};

}  // namespace correctnet
