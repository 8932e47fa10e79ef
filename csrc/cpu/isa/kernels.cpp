// The kernels for one instruction set: CMake compiles this file once for each, CN_TABLE being the name of its table and
// CN_NAME that of the instruction set.
#include "cpu/table.h"

namespace correctnet {

const Kernels CN_TABLE = {CN_NAME, {type_kernels<Float>(), type_kernels<Bfloat16>()}};

}  // namespace correctnet
