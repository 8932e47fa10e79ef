#include "cpu/noise_kernels.h"

#include <algorithm>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "cpu/threads.h"

namespace correctnet {
namespace {

constexpr int64_t kThreadWork = 1 << 15;  // weights that justify a thread

// Calls work(begin, end) on up to `threads` parts of range(count); borders between parts are multiples of `grain`.
template <class Work>
void share(int64_t count, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  const auto border = [&](int64_t part) { return std::min(count, grains * part / parts * grain); };
  on_threads(parts, [&](int64_t part) { work(border(part), border(part + 1)); });
}

}  // namespace

const NoiseKernels& noise_kernels(Isa isa) {
  switch (isa) {
#if defined(CORRECTNET_X86)
    case Isa::avx2:
      return noise_avx2;
    case Isa::avx512:
      return noise_avx512;
    case Isa::avx512bf16:
    case Isa::amx:
      return noise_avx512bf16;
#endif
    default:
      return noise_portable;
  }
}

void lognormal(const Noise& noise, int64_t first, int64_t count, float* out, int threads) {
  const NoiseKernels& kernels = noise_kernels(selected_isa());
  share(count, kThreadWork, threads,
        [&](int64_t begin, int64_t end) { kernels.factors(noise, first + begin, end - begin, out + begin); });
}

template <class T>
void noisy_weight(const Noise& noise, const WeightShape& shape, Nominal nominal, T* out, int threads) {
  const NoiseKernels& kernels = noise_kernels(selected_isa());
  const int64_t row = std::max<int64_t>(1, shape.taps * shape.channels), grain = (kThreadWork + row - 1) / row;
  nominal.row = row;
  if (noise.kind != NoiseKind::factor) {
    if (!shape.channels_last && shape.taps > 1 && shape.channels > 1)
      throw std::invalid_argument("noisy_weight: noise that is no factor needs channels last");
    if (!nominal.spread || (noise.faults.any && !nominal.reach))
      throw std::invalid_argument("noisy_weight: an array that the noise reads is missing");
  }
  share(shape.rows, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(shape.channels_last ? 0 : 2 * row);
    if constexpr (std::is_same_v<T, float>)
      kernels.noisy_float32(noise, shape, begin, end, nominal, out, scratch.data());
    else
      kernels.noisy_bfloat16(noise, shape, begin, end, nominal, out, scratch.data());
  });
}

template void noisy_weight(const Noise&, const WeightShape&, Nominal, float*, int);
template void noisy_weight(const Noise&, const WeightShape&, Nominal, uint16_t*, int);

}  // namespace correctnet
