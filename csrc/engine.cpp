#include "engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "plan.h"

namespace correctnet {

namespace {

// Shares of a second-level cache: packed weights that are drawn and used at a time, unless they are kept; kept weights
// of all chips that a thread has at hand; activations of a chunk of few images.
constexpr size_t kBlockBytes = 256 << 10, kChipsBytes = 512 << 10, kImagesBytes = 512 << 10;
constexpr int kChunkGroups = 4;                    // as many as the widest tile has
constexpr size_t kSlackBytes = 16 * kVectorBytes;  // AMX multiplies up to 16 slots behind a tensor by zeros
constexpr size_t kNotKept = SIZE_MAX;

float bfloat16_to_float(uint16_t b) { return noise::from_bits(uint32_t(b) << 16); }

// (images, channels, height, width) in float32 to lanes, beginning at image `first`. Lanes behind the last image are
// zero.
void to_lanes(Type type, const float* images, Shape shape, int64_t first, int64_t count, int groups, char* y) {
  const size_t area = size_t(shape.height) * shape.width, size = area * shape.channels;
  const size_t slot = size_t(groups) * kVectorBytes, pixel = slots_of(type, shape.channels) * slot;
  memset(y, 0, area * pixel);
  for (int64_t i = 0; i < std::min<int64_t>(count - first, groups * kLanes); ++i)
    for (int c = 0; c < shape.channels; ++c) {
      const float* x = images + (first + i) * size + c * area;
      char* lane = y + i / kLanes * kVectorBytes + i % kLanes * 4;
      if (type == Type::float32) {
        lane += c * slot;
        for (size_t p = 0; p < area; ++p) memcpy(lane + p * pixel, &x[p], 4);
      } else {
        lane += c / 2 * slot + c % 2 * 2;
        for (size_t p = 0; p < area; ++p) {
          const uint16_t b = noise::bfloat16(x[p]);
          memcpy(lane + p * pixel, &b, 2);
        }
      }
    }
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

struct Plan::Impl::Images {
  const Run& run;
  int64_t groups, chunks;
  int chunk_groups;          // of all chunks but the last
  std::vector<Buffer> kept;  // by value: a chunk has the size of a worker's buffer

  int groups_of(int64_t chunk) const { return int(std::min<int64_t>(chunk_groups, groups - chunk * chunk_groups)); }
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
  for (size_t bytes : plan.buffer_bytes) buffers.push_back((bytes + kSlackBytes) * layout.chunk_groups);
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

// As many groups of images as the tile is wide; fewer if their activations then stay in the cache.
int Plan::Impl::chunk_groups() const {
  size_t bytes = std::accumulate(buffer_bytes.begin(), buffer_bytes.end(), size_t(0));
  for (const Value& v : values)
    if (v.kept) bytes += v.group_bytes();
  for (int groups = kChunkGroups; groups > 0; groups /= 2)
    if (groups * bytes <= kImagesBytes) return groups;
  return kChunkGroups;
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

char* Plan::Impl::address(int value, Worker& worker, const Images& images, int64_t chunk) const {
  const Value& v = values[value];
  return v.kept ? images.kept[value].data() + chunk * images.chunk_groups * (v.group_bytes() + kSlackBytes)
                : worker.buffers[v.buffer].data();
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
  const size_t slot = size_t(groups) * kVectorBytes;
  std::vector<ChannelRun> runs;
  for (int index = 0; index < int(operations.size()); ++index) {
    const Operation& op = *operations[index];
    const Value& out = values[index];
    if (out.sampled != (chip != nullptr)) continue;
    char* y = address(index, worker, images, chunk);
    const size_t pixels = size_t(out.shape.height) * out.shape.width, out_pixel = out.slots * slot;
    if (op.kind == Kind::input) {
      to_lanes(type, images.run.images, out.shape, chunk * images.chunk_groups * kLanes, images.run.count, groups, y);
      continue;
    }
    const Value& in = values[op.inputs[0]];
    const char* x = address(op.inputs[0], worker, images, chunk);
    const size_t in_pixel = in.slots * slot;
    switch (op.kind) {
      case Kind::input: break;
      case Kind::conv: run_conv(worker, chip, index, x, y, groups); break;
      case Kind::pool:
        kernels.pool({x, y, groups, out.slots, in.shape.width, out.shape.height, out.shape.width, op.rows.data(),
                      op.cols.data(), op.average, op.divisor});
        break;
      case Kind::pointwise: {
        const char* b = op.inputs.size() > 1 ? address(op.inputs[1], worker, images, chunk) : nullptr;
        kernels.pointwise({x, b, y, groups, out.slots, int(pixels), op.pointwise.view()});
        break;
      }
      case Kind::flatten: kernels.flatten({x, y, groups, in.shape.channels, in.shape.height * in.shape.width}); break;
      case Kind::concat:
        for (size_t p = 0; p < pixels; ++p) {
          runs.clear();
          for (int part : op.inputs)
            runs.push_back(
                {address(part, worker, images, chunk) + p * values[part].slots * slot, 0, values[part].shape.channels});
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
}

// Writes the outputs of a chunk, and returns on how many of its images the first largest output is the label's.
int64_t Plan::Impl::collect(Worker& worker, const Images& images, int64_t chunk, int64_t sample) const {
  const Run& run = images.run;
  const Value& v = values[output];
  const Type stored = v.float_out ? Type::float32 : type;
  const int groups = images.groups_of(chunk);
  const int64_t first = chunk * images.chunk_groups * kLanes, pixels = int64_t(v.shape.height) * v.shape.width;
  const char* y = address(output, worker, images, chunk);
  int64_t correct = 0;
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
      for (int c = 1; c < v.shape.channels; ++c)
        if (const float a = from_lanes(stored, y, c, int(i), groups); a > largest) {
          largest = a;
          best = c;
        }
      correct += best == run.labels[first + i];
    }
  }
  return correct;
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
  l.chunk_groups = run.chunk_groups ? run.chunk_groups : chunk_groups();
  l.groups = (run.count + kLanes - 1) / kLanes;
  l.chunks = (l.groups + l.chunk_groups - 1) / l.chunk_groups;
  const int64_t samples = int64_t(run.samples.size());
  l.parts = std::min(l.chunks, (run.threads + samples - 1) / samples);
  l.threads = std::min<int64_t>(run.threads, std::max(l.chunks, samples * l.parts));
  l.kept_offset = kept_offsets(run.keep_bytes, l.kept_bytes);
  const int64_t fitting = l.kept_bytes ? std::max<int64_t>(1, int64_t(kChipsBytes / l.kept_bytes)) : 1;
  l.together = std::min(fitting, (samples + l.threads - 1) / l.threads);
  return l;
}

size_t Plan::bytes(const Run& run) const {
  const Impl::Layout layout = impl_->layout(run);
  const Impl::Worker::Sizes sizes(*impl_, layout);
  size_t worker = sizes.block + sizes.scratch + layout.together * layout.kept_bytes;
  worker = std::accumulate(sizes.buffers.begin(), sizes.buffers.end(), worker);
  size_t bytes = layout.threads * worker;
  for (const Value& v : impl_->values)
    if (v.kept) bytes += layout.value_bytes(v);
  return bytes;
}

void Plan::run(const Run& run) const {
  const Impl& plan = *impl_;
  const Impl::Layout layout = plan.layout(run);
  const Value& out = plan.values[plan.output];
  if (!run.images || (run.labels == nullptr) != (run.correct == nullptr))
    fail("run: images are missing, or one of labels and correct is");
  if (run.correct && (out.shape.height != 1 || out.shape.width != 1)) fail("run: the output is no vector of classes");

  Impl::Images images{run, layout.groups, layout.chunks, layout.chunk_groups, {}};
  for (const Value& v : plan.values) images.kept.emplace_back(v.kept ? layout.value_bytes(v) : 0);
  std::vector<std::unique_ptr<Impl::Worker>> workers;
  for (int64_t i = 0; i < layout.threads; ++i) workers.push_back(std::make_unique<Impl::Worker>(plan, run, layout));

  const int64_t samples = int64_t(run.samples.size()), parts = layout.parts, together = layout.together;
  share(workers, layout.chunks,
        [&](Impl::Worker& worker, int64_t chunk) { plan.run_operations(worker, images, chunk, nullptr); });

  std::vector<int64_t> correct(samples * parts);
  share(workers, (samples + together - 1) / together * parts, [&](Impl::Worker& worker, int64_t item) {
    const int64_t first = item / parts * together, part = item % parts, chips = std::min(together, samples - first);
    for (int64_t i = 0; i < chips; ++i) {
      worker.chips[i].sample = run.samples[first + i];
      worker.chips[i].drawn.assign(plan.operations.size(), false);
    }
    for (int64_t chunk = part * layout.chunks / parts; chunk < (part + 1) * layout.chunks / parts; ++chunk)
      for (int64_t i = 0; i < chips; ++i) {
        plan.run_operations(worker, images, chunk, &worker.chips[i]);
        correct[(first + i) * parts + part] += plan.collect(worker, images, chunk, first + i);
      }
  });
  if (run.correct)
    for (int64_t s = 0; s < samples; ++s)
      run.correct[s] = std::accumulate(&correct[s * parts], &correct[s * parts] + parts, int64_t(0));
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
