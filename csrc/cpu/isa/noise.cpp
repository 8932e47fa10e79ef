// The noise for one instruction set: CMake compiles this file once for each, CN_TABLE being the name of its table.
#include "cpu/noise_table.h"

namespace correctnet {

const NoiseKernels CN_TABLE = noise_kernels_here();

}  // namespace correctnet
