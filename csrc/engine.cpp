#include "engine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "plan.h"

namespace correctnet {

namespace {

// Shares of a second-level cache: packed weights that are drawn and used at a time, unless they are kept; kept weights
// of all chips that a thread has at hand.
constexpr size_t kBlockBytes = 256 << 10, kChipsBytes = 512 << 10;
constexpr int kChunkGroups = 4;                    // as many as the widest tile has
constexpr size_t kSlackBytes = 16 * kVectorBytes;  // AMX multiplies up to 16 slots behind a tensor by zeros
constexpr size_t kNotKept = SIZE_MAX;

float bfloat16_to_float(uint16_t b) { return noise::from_bits(uint32_t(b) << 16); }

// The lanes of one image for `count` pixels: a channel in float32, or two in bfloat16. A null channel is zero.
void to_cells(Type type, const float* even, const float* odd, size_t count, uint32_t* cells) {
  if (!even) {
    memset(cells, 0, count * sizeof(uint32_t));
  } else if (type == Type::float32) {
    memcpy(cells, even, count * sizeof(uint32_t));
  } else {
    for (size_t p = 0; p < count; ++p) cells[p] = noise::bfloat16(even[p]);
    for (size_t p = 0; odd && p < count; ++p) cells[p] |= uint32_t(noise::bfloat16(odd[p])) << 16;
  }
}

// (images, channels, height, width) in float32 to lanes, beginning at image `first`. Lanes behind the last image are
// zero. Taken in pieces of a map that stay in the cache.
void to_lanes(Type type, const float* images, Shape shape, int64_t first, int64_t count, int groups, char* y) {
  constexpr size_t kPiece = 128;
  const size_t area = size_t(shape.height) * shape.width, size = area * shape.channels;
  const int slots = slots_of(type, shape.channels), slot_channels = type == Type::float32 ? 1 : 2;
  uint32_t cells[kLanes][kPiece];
  for (int slot = 0; slot < slots; ++slot)
    for (int group = 0; group < groups; ++group)
      for (size_t begin = 0; begin < area; begin += kPiece) {
        const size_t pixels = std::min(kPiece, area - begin);
        for (int i = 0; i < kLanes; ++i) {
          const int64_t image = first + group * kLanes + i;
          const int channel = slot * slot_channels;
          const float* even = image < count ? images + image * size + channel * area + begin : nullptr;
          to_cells(type, even, even && channel + 1 < shape.channels ? even + area : nullptr, pixels, cells[i]);
        }
        for (size_t p = 0; p < pixels; ++p) {
          uint32_t vector[kLanes];
          for (int i = 0; i < kLanes; ++i) vector[i] = cells[i][p];
          memcpy(y + (((begin + p) * slots + slot) * groups + group) * kVectorBytes, vector, kVectorBytes);
        }
      }
}

// The one group of `x` to its place among the groups of `y`.
void widen(const char* x, size_t vectors, int group, int groups, char* y) {
  for (size_t i = 0; i < vectors; ++i) memcpy(y + (i * groups + group) * kVectorBytes, x + i * kVectorBytes, kVectorBytes);
}

// One channel of one image. `pixel`: the first slot of the first group.
float from_lanes(Type type, const char* pixel, int channel, int image, int groups) {
  const size_t slot = size_t(groups) * kVectorBytes;
  const char* lane = pixel + image / kLanes * kVectorBytes + image % kLanes * 4;
  if (type == Type::float32) {
    float a;
    memcpy(&a, lane + channel * slot, 4);
    return a;
  }
  uint16_t b;
  memcpy(&b, lane + channel / 2 * slot + channel % 2 * 2, 2);
  return bfloat16_to_float(b);
}

}  // namespace

const Kernels& kernels(Isa isa) {
  switch (isa) {
#if defined(CORRECTNET_X86)
    case Isa::avx2: return kernels_avx2;
    case Isa::avx512: return kernels_avx512;
    case Isa::avx512bf16: return kernels_avx512bf16;
    case Isa::amx: return kernels_amx;
#endif
    default: return kernels_portable;
  }
}

// ---- what a run needs -----------------------------------------------------------------------------------------------

// Of a chip: images that are classified correctly, and those with an output that is NaN or infinite.
struct Plan::Impl::Counts {
  int64_t correct = 0, nonfinite = 0;
};

struct Plan::Impl::Images {
  const Run& run;
  int64_t groups, chunks;
  int chunk_groups;                 // of all chunks but the last
  std::vector<Buffer> narrow, wide;  // kept values

  int groups_of(int64_t chunk) const { return int(std::min<int64_t>(chunk_groups, groups - chunk * chunk_groups)); }
};

// The images that an operation takes at a time: one group of a chunk, or all of them.
struct Plan::Impl::Part {
  int64_t chunk;
  bool narrow;
  int group, groups;  // `groups` from `group` on
};

// How a run is shared out.
struct Plan::Impl::Layout {
  int chunk_groups;
  int64_t groups, chunks;
  int64_t parts;                    // into which the images of a sample are split
  int64_t threads, together;        // workers, and the samples that each has at hand
  std::vector<size_t> kept_offset;  // by operation
  size_t kept_bytes;                // of a sample's packed weights

  size_t value_bytes(const Value& v) const { return chunks * chunk_groups * (v.group_bytes() + kSlackBytes); }
};

// A chip sample that a worker has at hand, and its packed weights as far as they are kept.
struct Plan::Impl::Chip {
  uint32_t sample = 0;
  Buffer weights;
  std::vector<char> drawn;  // by operation: whether its weights are there
};

struct Plan::Impl::Worker {
  const Run& run;
  const std::vector<size_t>& kept_offset;
  std::vector<Buffer> buffers;
  Buffer block, scratch;
  std::vector<Chip> chips;
  int64_t drawn = 0;

  // The sizes of what a worker holds beside its chips.
  struct Sizes {
    std::vector<size_t> buffers;
    size_t block = 0, scratch = 0;
    Sizes(const Impl& plan, const Layout& layout);
  };

  Worker(const Impl& plan, const Run& run, const Layout& layout);
};

Plan::Impl::Worker::Sizes::Sizes(const Impl& plan, const Layout& layout) {
  for (const BufferSize& size : plan.buffers)
    buffers.push_back((size.group_bytes + kSlackBytes) * (size.narrow ? 1 : layout.chunk_groups));
  for (size_t i = 0; i < plan.operations.size(); ++i) {
    const Operation& op = *plan.operations[i];
    if (op.kind != Kind::conv) continue;
    if (plan.kernels.scratch_bytes)
      scratch = std::max(scratch, plan.kernels.scratch_bytes(op.shape, layout.chunk_groups));
    if (!op.noise || layout.kept_offset[i] != kNotKept) continue;
    block = std::max(block, std::min(kBlockBytes, op.packed_bytes));
    for (const Panel& panel : op.panels) block = std::max(block, plan.kernels.packed_bytes(op.shape, panel));
  }
}

Plan::Impl::Worker::Worker(const Impl& plan, const Run& run, const Layout& layout)
    : run(run), kept_offset(layout.kept_offset), chips(layout.together) {
  const Sizes sizes(plan, layout);
  for (size_t bytes : sizes.buffers) buffers.emplace_back(bytes);
  block = Buffer(sizes.block);
  scratch = Buffer(sizes.scratch);
  for (Chip& chip : chips) chip.weights = Buffer(layout.kept_bytes);
}

// Where the packed weights of each operation lie among those that a worker keeps of a chip, and how many bytes they
// are.
std::vector<size_t> Plan::Impl::kept_offsets(size_t budget, size_t& bytes) const {
  std::vector<size_t> offsets;
  bytes = 0;
  for (const auto& op : operations) {
    const bool keep = op->noise && bytes + op->packed_bytes <= budget;
    offsets.push_back(keep ? bytes : kNotKept);
    if (keep) bytes += op->packed_bytes;
  }
  return offsets;
}

char* Plan::Impl::address(int value, Worker& worker, const Images& images, const Part& part) const {
  const Value& v = values[value];
  const Storage& storage = part.narrow ? v.narrow : v.wide;
  if (!storage.kept) return worker.buffers[storage.buffer].data();
  const int64_t group = part.chunk * images.chunk_groups + part.group;
  return (part.narrow ? images.narrow : images.wide)[value].data() + group * (v.group_bytes() + kSlackBytes);
}

// ---- operations -----------------------------------------------------------------------------------------------------

void Plan::Impl::run_conv(Worker& worker, Chip* chip, int index, const char* x, char* y, int groups) const {
  const Operation& op = *operations[index];
  ConvJob conv = {};
  conv.shape = &op.shape;
  conv.x = x;
  conv.y = y;
  conv.groups = groups;
  conv.out_slots = values[index].slots;
  conv.float_out = values[index].float_out;
  conv.panels = op.panels.data();
  conv.panel_count = int(op.panels.size());
  conv.packed = op.packed.data();
  conv.epilogue = op.pointwise.view();
  conv.scratch = worker.scratch.data();
  if (!op.noise) return kernels.conv(conv);

  const Noise noise{worker.run.seed, op.noise->layer, chip->sample, op.noise->sigma, op.noise->shift};
  const bool keep = worker.kept_offset[index] != kNotKept;
  const auto end = [&](size_t panel) {
    return panel + 1 < op.panels.size() ? op.panels[panel + 1].offset : op.packed_bytes;
  };
  for (size_t first = 0, last; first < op.panels.size(); first = last) {
    const size_t begin = op.panels[first].offset;
    for (last = first + 1; last < op.panels.size() && end(last) - begin <= kBlockBytes;) ++last;
    char* packed = keep ? chip->weights.data() + worker.kept_offset[index] + begin : worker.block.data();
    if (!chip->drawn[index]) {
      kernels.pack({&op.shape, op.weight.data(), &noise, &op.panels[first], int(last - first), packed});
      const int64_t row = int64_t(op.weight.size()) / op.shape.outputs;
      for (size_t i = first; i < last; ++i) worker.drawn += op.panels[i].outputs * row;
    }
    conv.panels = &op.panels[first];
    conv.panel_count = int(last - first);
    conv.packed = packed;
    kernels.conv(conv);
  }
  chip->drawn[index] = keep;
}

// Takes a chunk of images through the operations of a chip, or through those that are the same on all chips.
void Plan::Impl::run_operations(Worker& worker, const Images& images, int64_t chunk, Chip* chip) const {
  const int groups = images.groups_of(chunk);
  const Part whole{chunk, false, 0, groups};
  for (int group = 0; group < groups; ++group) {
    const Part part{chunk, true, group, 1};
    for (int i = 0; i < narrow; ++i) {
      const Value& v = values[i];
      if (v.sampled != (chip != nullptr)) continue;
      run_operation(worker, images, part, chip, i);
      if (v.wide.used)
        widen(address(i, worker, images, part), v.group_bytes() / kVectorBytes, group, groups,
              address(i, worker, images, whole));
    }
  }
  for (int i = narrow; i < int(operations.size()); ++i)
    if (values[i].sampled == (chip != nullptr)) run_operation(worker, images, whole, chip, i);
}

void Plan::Impl::run_operation(Worker& worker, const Images& images, const Part& part, Chip* chip, int index) const {
  const Operation& op = *operations[index];
  const Value& out = values[index];
  const int groups = part.groups;
  const size_t slot = size_t(groups) * kVectorBytes;
  const size_t pixels = size_t(out.shape.height) * out.shape.width, out_pixel = out.slots * slot;
  char* y = address(index, worker, images, part);
  if (op.kind == Kind::input) {
    const int64_t first = (part.chunk * images.chunk_groups + part.group) * kLanes;
    return to_lanes(type, images.run.images, out.shape, first, images.run.count, groups, y);
  }
  const Value& in = values[op.inputs[0]];
  const char* x = address(op.inputs[0], worker, images, part);
  const size_t in_pixel = in.slots * slot;
  std::vector<ChannelRun> runs;
  switch (op.kind) {
    case Kind::input: break;
    case Kind::conv:
      // What AMX multiplies by zeros behind the tensor must not be a NaN that other images or another chip left there.
      if (kernels.panel_width > kPanelOutputs && !(part.narrow ? in.narrow : in.wide).kept)
        memset(address(op.inputs[0], worker, images, part) + groups * in.group_bytes(), 0, groups * kSlackBytes);
      run_conv(worker, chip, index, x, y, groups);
      break;
    case Kind::pool:
      kernels.pool({x, y, groups, out.slots, in.shape.width, out.shape.height, out.shape.width, op.rows.data(),
                    op.cols.data(), op.average, op.divisor});
      break;
    case Kind::pointwise: {
      const char* b = op.inputs.size() > 1 ? address(op.inputs[1], worker, images, part) : nullptr;
      kernels.pointwise({x, b, y, groups, out.slots, int(pixels), op.pointwise.view()});
      break;
    }
    case Kind::flatten: kernels.flatten({x, y, groups, in.shape.channels, in.shape.height * in.shape.width}); break;
    case Kind::concat:
      for (size_t p = 0; p < pixels; ++p) {
        runs.clear();
        for (int input : op.inputs)
          runs.push_back(
              {address(input, worker, images, part) + p * values[input].slots * slot, 0, values[input].shape.channels});
        kernels.assemble({y + p * out_pixel, runs.data(), int(runs.size()), groups});
      }
      break;
    case Kind::unfold:
      for (size_t p = 0; p < pixels; ++p) {
        const Taps& taps = op.cols[p % out.shape.width];
        const char* row = x + p / out.shape.width * in.shape.width * in_pixel;
        runs.clear();
        for (int kx = 0; kx < op.kernel_w; ++kx) {
          const bool inside = taps.first <= kx && kx < taps.last;
          const int col = taps.start + (kx - taps.first) * op.dilation_w;
          runs.push_back({inside ? row + col * in_pixel : nullptr, 0, in.shape.channels});
        }
        kernels.assemble({y + p * out_pixel, runs.data(), int(runs.size()), groups});
      }
      break;
  }
}

// Writes the outputs of a chunk, and counts its images if there are labels.
Plan::Impl::Counts Plan::Impl::collect(Worker& worker, const Images& images, int64_t chunk, int64_t sample) const {
  const Run& run = images.run;
  const Value& v = values[output];
  const Type stored = v.float_out ? Type::float32 : type;
  const int groups = images.groups_of(chunk);
  const int64_t first = chunk * images.chunk_groups * kLanes, pixels = int64_t(v.shape.height) * v.shape.width;
  const char* y = address(output, worker, images, {chunk, false, 0, groups});
  Counts counts;
  for (int64_t i = 0; i < std::min<int64_t>(run.count - first, groups * kLanes); ++i) {
    if (run.outputs) {
      float* out = run.outputs + (sample * run.count + first + i) * v.shape.channels * pixels;
      for (int c = 0; c < v.shape.channels; ++c)
        for (int64_t p = 0; p < pixels; ++p)
          *out++ = from_lanes(stored, y + p * v.slots * groups * kVectorBytes, c, int(i), groups);
    }
    if (run.labels) {
      int best = 0;
      float largest = from_lanes(stored, y, 0, int(i), groups);
      bool nan = false, finite = true;
      for (int c = 0; c < v.shape.channels; ++c) {
        const float a = from_lanes(stored, y, c, int(i), groups);
        nan |= std::isnan(a);
        finite &= std::isfinite(a);
        if (a > largest) {
          largest = a;
          best = c;
        }
      }
      counts.correct += !nan && best == run.labels[first + i];
      counts.nonfinite += !finite;
    }
  }
  return counts;
}

// ---- all of it ------------------------------------------------------------------------------------------------------

namespace {

// Calls work(worker, item) for every item, each on the first worker that is free, a thread each. The first exception
// ends it and is thrown here.
template <class Worker, class Work>
void share(std::vector<std::unique_ptr<Worker>>& workers, int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  std::vector<std::exception_ptr> errors(workers.size());
  const auto loop = [&](size_t i) {
    try {
      for (int64_t item; (item = next.fetch_add(1)) < items;) work(*workers[i], item);
    } catch (...) {
      errors[i] = std::current_exception();
      next = items;
    }
  };
  std::vector<std::thread> threads;
  try {
    for (size_t i = 1; i < workers.size() && int64_t(i) < items; ++i) threads.emplace_back(loop, i);
  } catch (const std::system_error&) {
    // The system has no more threads; those that there are do all the work.
  }
  loop(0);
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace

// Fewer samples than threads: the images of a sample are split, and each part draws the sample's noise for itself. More:
// a worker takes each chunk through several chips, if their weights fit its cache, so that the images stay there.
Plan::Impl::Layout Plan::Impl::layout(const Run& run) const {
  if (output < 0) fail("run: the plan is not finished");
  if (run.count < 1 || run.samples.empty() || run.threads < 1 || run.chunk_groups < 0)
    fail("run: images, samples and threads are at least 1, chunk_groups at least 0");
  Layout l = {};
  l.chunk_groups = run.chunk_groups ? run.chunk_groups : kChunkGroups;
  l.groups = (run.count + kLanes - 1) / kLanes;
  l.chunks = (l.groups + l.chunk_groups - 1) / l.chunk_groups;
  const int64_t samples = int64_t(run.samples.size());
  l.parts = std::min(l.chunks, (run.threads + samples - 1) / samples);
  l.threads = std::min<int64_t>(run.threads, std::max(l.chunks, samples * l.parts));
  l.kept_offset = kept_offsets(run.keep_bytes, l.kept_bytes);
  const int64_t fitting = l.kept_bytes ? std::max<int64_t>(1, int64_t(kChipsBytes / l.kept_bytes)) : 1;
  // Every worker takes as many turns as the others.
  const int64_t turns = (samples + l.threads * fitting - 1) / (l.threads * fitting);
  l.together = (samples + l.threads * turns - 1) / (l.threads * turns);
  return l;
}

size_t Plan::bytes(const Run& run) const {
  const Impl::Layout layout = impl_->layout(run);
  const Impl::Worker::Sizes sizes(*impl_, layout);
  size_t worker = sizes.block + sizes.scratch + layout.together * layout.kept_bytes;
  worker = std::accumulate(sizes.buffers.begin(), sizes.buffers.end(), worker);
  size_t bytes = layout.threads * worker;
  for (const Value& v : impl_->values) bytes += (v.narrow.kept + v.wide.kept) * layout.value_bytes(v);
  return bytes;
}

void Plan::run(const Run& run) const {
  const Impl& plan = *impl_;
  const Impl::Layout layout = plan.layout(run);
  const Value& out = plan.values[plan.output];
  if (!run.images || (run.labels == nullptr) != (run.correct == nullptr))
    fail("run: images are missing, or one of labels and correct is");
  if (run.nonfinite && !run.correct) fail("run: nonfinite is counted beside correct");
  if (run.correct && (out.shape.height != 1 || out.shape.width != 1)) fail("run: the output is no vector of classes");

  Impl::Images images{run, layout.groups, layout.chunks, layout.chunk_groups, {}, {}};
  for (const Value& v : plan.values) {
    images.narrow.emplace_back(v.narrow.kept ? layout.value_bytes(v) : 0);
    images.wide.emplace_back(v.wide.kept ? layout.value_bytes(v) : 0);
  }
  std::vector<std::unique_ptr<Impl::Worker>> workers;
  for (int64_t i = 0; i < layout.threads; ++i) workers.push_back(std::make_unique<Impl::Worker>(plan, run, layout));

  const int64_t samples = int64_t(run.samples.size()), parts = layout.parts, together = layout.together;
  share(workers, layout.chunks,
        [&](Impl::Worker& worker, int64_t chunk) { plan.run_operations(worker, images, chunk, nullptr); });

  std::vector<Impl::Counts> counts(samples * parts);
  share(workers, (samples + together - 1) / together * parts, [&](Impl::Worker& worker, int64_t item) {
    const int64_t first = item / parts * together, part = item % parts, chips = std::min(together, samples - first);
    for (int64_t i = 0; i < chips; ++i) {
      worker.chips[i].sample = run.samples[first + i];
      worker.chips[i].drawn.assign(plan.operations.size(), false);
    }
    for (int64_t chunk = part * layout.chunks / parts; chunk < (part + 1) * layout.chunks / parts; ++chunk)
      for (int64_t i = 0; i < chips; ++i) {
        plan.run_operations(worker, images, chunk, &worker.chips[i]);
        const Impl::Counts found = plan.collect(worker, images, chunk, first + i);
        counts[(first + i) * parts + part].correct += found.correct;
        counts[(first + i) * parts + part].nonfinite += found.nonfinite;
      }
  });
  for (int64_t s = 0; run.correct && s < samples; ++s) {
    Impl::Counts sum;
    for (int64_t part = 0; part < parts; ++part) {
      sum.correct += counts[s * parts + part].correct;
      sum.nonfinite += counts[s * parts + part].nonfinite;
    }
    run.correct[s] = sum.correct;
    if (run.nonfinite) run.nonfinite[s] = sum.nonfinite;
  }
  if (run.drawn) {
    *run.drawn = 0;
    for (const auto& worker : workers) *run.drawn += worker->drawn;
  }
}

Cost Plan::cost() const {
  Cost cost;
  for (size_t i = 0; i < impl_->operations.size(); ++i) {
    const Operation& op = *impl_->operations[i];
    if (op.kind != Kind::conv) continue;
    const auto taps = [pool = op.shape.pool](const std::vector<Taps>& all) {
      double sum = 0;
      for (size_t j = 0; j < (pool ? all.size() / 2 * 2 : all.size()); ++j) sum += all[j].last - all[j].first;
      return sum;
    };
    const double flop =
        2.0 * taps(op.rows) * taps(op.cols) * op.shape.outputs * (op.shape.channels / op.shape.groups);
    (impl_->values[i].sampled ? cost.sampled : cost.shared) += flop;
    if (op.noise) cost.weights += int64_t(op.weight.size());
  }
  return cost;
}

}  // namespace correctnet
