// AVX-512 with BF16 (-march=x86-64-v4 -mavx512bf16).
#include "../table.h"

namespace correctnet {

const Kernels kernels_avx512bf16 = {"avx512bf16", {type_kernels<Float>(), type_kernels<Bfloat16>()}};

}  // namespace correctnet
