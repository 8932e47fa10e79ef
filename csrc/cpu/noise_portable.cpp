// portable C++, on any machine.
#include "../noise_table.h"

namespace correctnet {

const NoiseKernels noise_portable = noise_kernels_here();

}  // namespace correctnet
