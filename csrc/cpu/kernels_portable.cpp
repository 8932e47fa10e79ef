// portable C++, on any machine.
#include "../table.h"

namespace correctnet {

const Kernels kernels_portable = {"portable", {type_kernels<Float>(), type_kernels<Bfloat16>()}};

}  // namespace correctnet
