// AMX for bfloat16 and AVX-512 for the rest (-march=x86-64-v4 -mavx512bf16); with CORRECTNET_AMX_MODEL the modelled
// tile instructions, and the rest for whatever the flags say. The process needs the operating system's leave to use
// tiles.
#include "../amx.h"
#include "../table.h"

namespace correctnet {

#if defined(CORRECTNET_AMX_MODEL)
#define CN_TABLE kernels_amx_model
#define CN_NAME "amx model"
#else
#define CN_TABLE kernels_amx
#define CN_NAME "amx"
#endif

// clang-format off
const Kernels CN_TABLE = {
    CN_NAME,
    {type_kernels<Float>(),
     {amx_packed_bytes, amx_scratch_bytes, amx_pack, amx_conv, pool<Bfloat16>, pointwise<Bfloat16>, flatten<Bfloat16>,
      assemble<Bfloat16>, kAmxOutputs, amx_peak}}};
// clang-format on

}  // namespace correctnet
