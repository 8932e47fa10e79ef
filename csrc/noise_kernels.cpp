#include "noise_kernels.h"

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace correctnet {
namespace {

constexpr int64_t kThreadWork = 1 << 15;  // weights that are worth a thread: some 30 us of work

// work(begin, end) on `threads` parts of range(count), whose inner borders are multiples of `grain`.
template <class Work>
void share(int64_t count, int64_t grain, int threads, const Work& work) {
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  const auto border = [&](int64_t part) { return std::min(count, grains * part / parts * grain); };
  std::vector<std::exception_ptr> errors(parts);
  const auto run = [&](int64_t part) {
    try {
      work(border(part), border(part + 1));
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t part = 1; part < parts; ++part) others.emplace_back(run, part);
  } catch (const std::system_error&) {
    // The system has no more threads; this one does what is left.
  }
  run(0);
  for (int64_t part = int64_t(others.size()) + 1; part < parts; ++part) run(part);
  for (std::thread& thread : others) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

void run_noisy(const NoiseKernels& kernels, const Noise& noise, const Layer& layer, int64_t first, int64_t last,
               const float* weight, float* out, float* scratch) {
  kernels.noisy_float32(noise, layer, first, last, weight, out, scratch);
}
void run_noisy(const NoiseKernels& kernels, const Noise& noise, const Layer& layer, int64_t first, int64_t last,
               const float* weight, uint16_t* out, float* scratch) {
  kernels.noisy_bfloat16(noise, layer, first, last, weight, out, scratch);
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
void noisy_weight(const Noise& noise, const Layer& layer, const float* weight, T* out, int threads) {
  const NoiseKernels& kernels = noise_kernels(selected_isa());
  const int64_t row = std::max<int64_t>(1, layer.taps * layer.channels), grain = (kThreadWork + row - 1) / row;
  share(layer.rows, grain, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(layer.channels_last ? 0 : 2 * row);
    run_noisy(kernels, noise, layer, begin, end, weight, out, scratch.data());
  });
}

template void noisy_weight(const Noise&, const Layer&, const float*, float*, int);
template void noisy_weight(const Noise&, const Layer&, const float*, uint16_t*, int);

}  // namespace correctnet
