// AVX2 and FMA (-mavx2 -mfma).
#include "../table.h"

namespace correctnet {

const Kernels kernels_avx2 = {"avx2", {type_kernels<Float>(), type_kernels<Bfloat16>()}};

}  // namespace correctnet
