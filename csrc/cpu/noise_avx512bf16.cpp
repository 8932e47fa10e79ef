// AVX-512 with BF16 (-march=x86-64-v4 -mavx512bf16).
#include "../noise_table.h"

namespace correctnet {

const NoiseKernels noise_avx512bf16 = noise_kernels_here();

}  // namespace correctnet
