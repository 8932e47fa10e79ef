// AVX-512 F, BW, DQ and VL (-march=x86-64-v4).
#include "../noise_table.h"

namespace correctnet {

const NoiseKernels noise_avx512 = noise_kernels_here();

}  // namespace correctnet
