// AVX2 and FMA (-mavx2 -mfma).
#include "../noise_table.h"

namespace correctnet {

const NoiseKernels noise_avx2 = noise_kernels_here();

}  // namespace correctnet
