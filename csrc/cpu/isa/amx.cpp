// AMX for bfloat16 and AVX-512 for everything else. With CORRECTNET_AMX_MODEL the tile instructions are modelled in C++
// and everything else is as the compiler flags say. The process needs permission to use tiles (isa.cpp).
#include "cpu/amx.h"
#include "cpu/table.h"

namespace correctnet {

// clang-format off
const Kernels CN_TABLE = {
    CN_NAME,
    {type_kernels<Float>(),
     {packed_bytes_of<Bfloat16, amx_packed_bytes>, amx_scratch_bytes, pack_of<Bfloat16, amx_pack>,
      conv_of<Bfloat16, amx_conv>, pool<Bfloat16>, pointwise<Bfloat16>, normalize<Bfloat16>,
      flatten<Bfloat16>, assemble<Bfloat16>, attention<Bfloat16>, kAmxOutputs, amx_peak}}};
// clang-format on

}  // namespace correctnet
