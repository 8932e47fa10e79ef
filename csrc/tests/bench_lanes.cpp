// How fast the kernels are on one core: VGG16's convolution shapes with prepared weights, drawing and packing noisy
// weights, and whole networks. Times are CPU times of the thread, each figure the median of its repetitions.
//
//   cmake --build build --target bench_lanes && build/bench_lanes [instruction set]
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <string>

#include "networks.h"
#include "plan/plan_impl.h"
#include "testing.h"

using namespace correctnet;

namespace {

double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

template <class Work>
double median_seconds(int repetitions, const Work& work) {
  work();
  std::vector<double> seconds;
  for (int i = 0; i < repetitions; ++i) {
    const double start = thread_seconds();
    work();
    seconds.push_back(thread_seconds() - start);
  }
  std::nth_element(seconds.begin(), seconds.begin() + repetitions / 2, seconds.end());
  return seconds[repetitions / 2];
}

// A 3 x 3 convolution with padding 1 on size x size images, 64 of them: executed GFLOP/s (taps on padding do not
// count), and ns a weight for drawing and packing.
void bench_conv(const Kernels& kernels, Type type, int size, int channels, int outputs, bool pool) {
  const TypeKernels& k = kernels.type[int(type)];
  const int image_blocks = 4, slots = type == Type::float32 ? channels : channels / 2;
  const int out_slots = type == Type::float32 ? outputs : outputs / 2;
  std::vector<Taps> taps;
  double inside = 0;
  for (int i = 0; i < size; ++i) {
    taps.push_back({i == 0, 3 - (i == size - 1), i - (i != 0)});
    inside += taps.back().last - taps.back().first;
  }
  ConvShape shape = {};
  shape.outputs = outputs;
  shape.kernel_h = shape.kernel_w = 3;
  shape.stride_h = shape.stride_w = shape.dilation_h = shape.dilation_w = shape.conv_groups = 1;
  shape.channels = channels;
  shape.in_slots = slots;
  shape.in_w = shape.out_h = shape.out_w = size;
  shape.rows = shape.cols = taps.data();
  shape.pool = pool;
  std::vector<Panel> panels;
  size_t bytes = 0;
  for (int first = 0; first < outputs;) {
    const int rest = outputs - first, wide = k.panel_width;
    const int width = wide > 6 ? wide : rest == 8 || rest == 4 ? 4 : rest == 2 ? 2 : 6;
    panels.push_back({first, std::min(width, rest), width, 0, slots, bytes});
    bytes += k.packed_bytes(shape, panels.back());
    first += width;
  }
  Buffer x(size_t(size) * size * slots * image_blocks * kVectorBytes + 16 * image_blocks * kVectorBytes);
  Buffer y(size_t(size) * size * out_slots * image_blocks * kVectorBytes), packed(bytes);
  Buffer scratch(k.scratch_bytes ? k.scratch_bytes(shape, image_blocks) : 0);
  std::vector<float> weight(size_t(outputs) * 9 * channels, 0.01f), ones(outputs, 1.0f);
  const Noise noise = noise::on_chip(lognormal_noise(2, 0.5, 0), 1, 3);
  const PackJob pack{&shape, weight.data(), &noise, panels.data(), int(panels.size()), packed.data()};
  const double pack_seconds = median_seconds(3, [&] { k.pack(pack); });
  ConvJob job = {};
  job.shape = &shape;
  job.x = x.data();
  job.y = y.data();
  job.image_blocks = image_blocks;
  job.out_slots = out_slots;
  job.panels = panels.data();
  job.panel_count = int(panels.size());
  job.packed = packed.data();
  job.epilogue = {ones.data(), ones.data(), nullptr, nullptr, Activation::relu, 0, 0, true};
  job.scratch = scratch.data();
  const double seconds = median_seconds(5, [&] { k.conv(job); });
  const double flop = 2 * inside * inside * channels * outputs * image_blocks * kLanes;
  printf("  %2d x %2d, %3d -> %3d%s: %5.0f GFLOP/s, packing %.2f ns a weight\n", size, size, channels, outputs,
         pool ? ", pool" : "", flop / seconds * 1e-9, pack_seconds / weight.size() * 1e9);
}

void bench_network(const char* name, const Plan& plan, Shape in, int count, int few, int many) {
  std::vector<float> images(size_t(count) * in.channels * in.height * in.width, 0.5f);
  std::vector<int64_t> labels(count), correct(many);
  const auto seconds = [&](int samples) {
    Run run;
    run.images = images.data();
    run.count = count;
    run.labels = labels.data();
    run.correct = correct.data();
    for (int s = 0; s < samples; ++s) run.samples.push_back(s);
    return median_seconds(3, [&] { plan.run(run); });
  };
  const double a = seconds(few), b = seconds(many);
  printf("  %s, %d images a chip: %.0f images/s (%.3f ms a chip, %.3f ms once)\n", name, count,
         count * (many - few) / (b - a), (b - a) / (many - few) * 1e3, (a - few * (b - a) / (many - few)) * 1e3);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Kernels* kernels : available()) {
    if (argc > 1 ? strcmp(argv[1], kernels->name) != 0 : kernels == &kernels_amx_model) continue;
    for (Type type : {Type::bfloat16, Type::float32}) {
      printf("%s, %s\n", kernels->name, type == Type::float32 ? "float32" : "bfloat16");
      bench_conv(*kernels, type, 32, 64, 64, false);
      bench_conv(*kernels, type, 32, 64, 64, true);
      bench_conv(*kernels, type, 16, 128, 128, false);
      bench_conv(*kernels, type, 8, 256, 256, false);
      bench_conv(*kernels, type, 8, 256, 256, true);
      bench_conv(*kernels, type, 4, 512, 512, false);
      bench_conv(*kernels, type, 2, 512, 512, false);
      Plan lenet(type, *kernels, {1, 32, 32});
      lenet.finish(lenet5(lenet, 0.5));
      bench_network("LeNet-5", lenet, {1, 32, 32}, 1024, 2, 12);
      Plan vgg(type, *kernels, {3, 32, 32});
      vgg.finish(vgg16(vgg, 0.5, BatchNorm::before));
      bench_network("VGG16", vgg, {3, 32, 32}, 128, 1, 2);
    }
  }
}
