#include "plan/plan_impl.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

#include "cpu/threads.h"

namespace correctnet {

namespace {

// Shares of a second-level cache: packed weights that are drawn and used at a time, unless they are kept; kept weights
// of all chips that a thread works on at a time.
constexpr size_t kDrawBytes = 256 << 10, kChipsBytes = 512 << 10;
constexpr int kChunkBlocks = 4;                    // as many as the widest tile has
constexpr size_t kSlackBytes = 16 * kVectorBytes;  // AMX multiplies up to 16 slots past a tensor by zeros
constexpr size_t kNotKept = SIZE_MAX;

float bfloat16_to_float(uint16_t b) { return noise::from_bits(uint32_t(b) << 16); }

// How the numbers of an image lie in memory: (channels, height, width), or (height, width, channels) where `last`. In
// lanes they are cells of 4 bytes, a channel in float32 or two in bfloat16. A row of cells follows memory: the pixels of
// a slot, or the slots of a pixel.
struct Order {
  bool last;
  Type type;
  size_t channels, area, slots;

  Order(bool last, Type type, Shape shape, int slots)
      : last(last), type(type), channels(shape.channels), area(size_t(shape.height) * shape.width), slots(slots) {}
  size_t slot_channels() const { return type == Type::float32 ? 1 : 2; }
  size_t rows() const { return last ? area : slots; }
  size_t cells() const { return last ? slots : area; }
  // Of a cell: its place among the slots of all pixels, and that of its first channel in an image.
  size_t place(size_t row, size_t cell) const { return last ? row * slots + cell : cell * slots + row; }
  size_t number(size_t row, size_t cell) const {
    return last ? row * channels + cell * slot_channels() : row * slot_channels() * area + cell;
  }
  // From a cell to the next, and from its first channel to its second, in an image.
  size_t step() const { return last ? slot_channels() : 1; }
  size_t second() const { return last ? 1 : area; }
  // How many of `count` cells have a second channel in bfloat16: all but the last of an odd number of channels.
  size_t pairs(size_t row, size_t cell, size_t count) const {
    if (!last) return 2 * row + 1 < channels ? count : 0;
    return std::min(count, channels / 2 - std::min(cell, channels / 2));
  }
};

constexpr size_t kPiece = 128;  // cells of 16 images that stay in the cache

void read_cells(const Order& order, const float* image, size_t row, size_t cell, size_t count, uint32_t* cells) {
  const float* x = image + order.number(row, cell);
  if (order.type == Type::float32) {
    memcpy(cells, x, count * sizeof(uint32_t));
    return;
  }
  const size_t step = order.step(), second = order.second(), pairs = order.pairs(row, cell, count);
  for (size_t k = 0; k < count; ++k) cells[k] = noise::bfloat16(x[k * step]);
  for (size_t k = 0; k < pairs; ++k) cells[k] |= uint32_t(noise::bfloat16(x[k * step + second])) << 16;
}

void write_cells(const Order& order, const uint32_t* cells, size_t row, size_t cell, size_t count, float* image) {
  float* x = image + order.number(row, cell);
  if (order.type == Type::float32) {
    memcpy(x, cells, count * sizeof(float));
    return;
  }
  const size_t step = order.step(), second = order.second(), pairs = order.pairs(row, cell, count);
  for (size_t k = 0; k < count; ++k) x[k * step] = bfloat16_to_float(uint16_t(cells[k]));
  for (size_t k = 0; k < pairs; ++k) x[k * step + second] = bfloat16_to_float(uint16_t(cells[k] >> 16));
}

// Converts images in float32 to images in lanes, beginning at image `first`. Lanes past the last image are zero.
void to_lanes(const Order& order, const float* images, int64_t first, int64_t count, int blocks, char* y) {
  uint32_t cells[kLanes][kPiece];
  for (size_t row = 0; row < order.rows(); ++row)
    for (int block = 0; block < blocks; ++block)
      for (size_t begin = 0; begin < order.cells(); begin += kPiece) {
        const size_t piece = std::min(kPiece, order.cells() - begin);
        for (int i = 0; i < kLanes; ++i) {
          const int64_t image = first + block * kLanes + i;
          if (image < count)
            read_cells(order, images + image * order.channels * order.area, row, begin, piece, cells[i]);
          else
            memset(cells[i], 0, piece * sizeof(uint32_t));
        }
        for (size_t k = 0; k < piece; ++k) {
          uint32_t vector[kLanes];
          for (int i = 0; i < kLanes; ++i) vector[i] = cells[i][k];
          memcpy(y + (order.place(row, begin + k) * blocks + block) * kVectorBytes, vector, kVectorBytes);
        }
      }
}

// Copies the single image block of `x` to its place among the blocks of `y`.
void widen(const char* x, size_t vectors, int block, int blocks, char* y) {
  for (size_t i = 0; i < vectors; ++i) memcpy(y + (i * blocks + block) * kVectorBytes, x + i * kVectorBytes, kVectorBytes);
}

// Converts images in lanes, of which the first `count` are wanted, to images in float32: `to_lanes` the other way.
void to_images(const Order& order, const char* x, int64_t count, int blocks, float* images) {
  uint32_t cells[kLanes][kPiece];
  for (size_t row = 0; row < order.rows(); ++row)
    for (int block = 0; block < blocks && block * kLanes < count; ++block)
      for (size_t begin = 0; begin < order.cells(); begin += kPiece) {
        const size_t piece = std::min(kPiece, order.cells() - begin);
        for (size_t k = 0; k < piece; ++k) {
          uint32_t vector[kLanes];
          memcpy(vector, x + (order.place(row, begin + k) * blocks + block) * kVectorBytes, kVectorBytes);
          for (int i = 0; i < kLanes; ++i) cells[i][k] = vector[i];
        }
        for (int i = 0; i < kLanes && block * kLanes + i < count; ++i)
          write_cells(order, cells[i], row, begin, piece, images + (block * kLanes + i) * order.channels * order.area);
      }
}

// Reads one channel of one image. `pixel`: the first slot of its first block.
float from_lanes(Type type, const char* pixel, int channel, int image, int blocks) {
  const size_t slot = size_t(blocks) * kVectorBytes;
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

// ---- state of a run -------------------------------------------------------------------------------------------------

// Images of a chip that are classified correctly, and images with an output that is NaN or infinite.
struct Plan::Impl::Counts {
  int64_t correct = 0, nonfinite = 0;
};

struct Plan::Impl::Images {
  const Run& run;
  int64_t blocks, chunks;
  int chunk_blocks;                  // of all chunks but the last
  std::vector<Buffer> narrow, wide;  // kept values

  int blocks_of(int64_t chunk) const { return int(std::min<int64_t>(chunk_blocks, blocks - chunk * chunk_blocks)); }
};

// The images that an operation processes at a time: one block of a chunk, or all of them.
struct Plan::Impl::Part {
  int64_t chunk;
  bool narrow;
  int block, blocks;  // `blocks` from `block` on
};

// How a run is divided among workers.
struct Plan::Impl::Layout {
  int chunk_blocks;
  int64_t blocks, chunks;
  int64_t parts;                    // number of parts into which the images of a sample are split
  int64_t threads, together;        // number of workers, and of samples that each works on at a time
  std::vector<size_t> kept_offset;  // by operation
  size_t kept_bytes;                // of a sample's packed weights

  size_t value_bytes(const Value& v) const { return chunks * chunk_blocks * (v.block_bytes() + kSlackBytes); }
};

// A chip sample that a worker works on, and those of its packed weights that are kept.
struct Plan::Impl::Chip {
  uint32_t sample = 0;
  Buffer weights;
  std::vector<char> drawn;  // by operation: whether `weights` holds its weights
};

struct Plan::Impl::Worker {
  const Run& run;
  const std::vector<size_t>& kept_offset;
  std::vector<Buffer> buffers;
  Buffer drawn_panels, scratch;
  std::vector<Chip> chips;
  int64_t drawn = 0;

  // Sizes of the memory of a worker, without its chips.
  struct Sizes {
    std::vector<size_t> buffers;
    size_t drawn_panels = 0, scratch = 0;
    Sizes(const Impl& plan, const Layout& layout);
  };

  Worker(const Impl& plan, const Run& run, const Layout& layout);
};

Plan::Impl::Worker::Sizes::Sizes(const Impl& plan, const Layout& layout) {
  for (const BufferSize& size : plan.buffers)
    buffers.push_back((size.block_bytes + kSlackBytes) * (size.narrow ? 1 : layout.chunk_blocks));
  for (size_t i = 0; i < plan.operations.size(); ++i) {
    const Operation& op = *plan.operations[i];
    scratch = std::max(scratch, op.scratch);
    if (op.kind != Kind::conv) continue;
    if (plan.kernels.scratch_bytes)
      scratch = std::max(scratch, plan.kernels.scratch_bytes(op.shape, layout.chunk_blocks));
    if (!op.noise || layout.kept_offset[i] != kNotKept) continue;
    drawn_panels = std::max(drawn_panels, std::min(kDrawBytes, op.packed_bytes));
    for (const Panel& panel : op.panels) drawn_panels = std::max(drawn_panels, plan.kernels.packed_bytes(op.shape, panel));
  }
}

Plan::Impl::Worker::Worker(const Impl& plan, const Run& run, const Layout& layout)
    : run(run), kept_offset(layout.kept_offset), chips(layout.together) {
  const Sizes sizes(plan, layout);
  for (size_t bytes : sizes.buffers) buffers.emplace_back(bytes);
  drawn_panels = Buffer(sizes.drawn_panels);
  scratch = Buffer(sizes.scratch);
  for (Chip& chip : chips) chip.weights = Buffer(layout.kept_bytes);
}

// Offset of the packed weights of each operation among those that a worker keeps for a chip, and their size in all.
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
  const int64_t block = part.chunk * images.chunk_blocks + part.block;
  return (part.narrow ? images.narrow : images.wide)[value].data() + block * (v.block_bytes() + kSlackBytes);
}

// ---- operations -----------------------------------------------------------------------------------------------------

void Plan::Impl::run_conv(Worker& worker, Chip* chip, int index, const char* x, char* y, int blocks) const {
  const Operation& op = *operations[index];
  ConvJob conv = {};
  conv.shape = &op.shape;
  conv.x = x;
  conv.y = y;
  conv.image_blocks = blocks;
  conv.out_slots = values[index].slots;
  conv.float_out = values[index].float_out;
  conv.panels = op.panels.data();
  conv.panel_count = int(op.panels.size());
  conv.packed = op.packed.data();
  conv.epilogue = op.pointwise.view();
  conv.scratch = worker.scratch.data();
  if (!op.noise) return kernels.conv(conv);

  const Noise noise = noise::on_chip(*op.noise, worker.run.seed, chip->sample);
  const bool keep = worker.kept_offset[index] != kNotKept;
  const auto end = [&](size_t panel) {
    return panel + 1 < op.panels.size() ? op.panels[panel + 1].offset : op.packed_bytes;
  };
  for (size_t first = 0, last; first < op.panels.size(); first = last) {
    const size_t begin = op.panels[first].offset;
    for (last = first + 1; last < op.panels.size() && end(last) - begin <= kDrawBytes;) ++last;
    char* packed = keep ? chip->weights.data() + worker.kept_offset[index] + begin : worker.drawn_panels.data();
    if (!chip->drawn[index]) {
      kernels.pack({&op.shape, op.weight.data(), &noise, &op.panels[first], int(last - first), packed, op.spread.data(),
                    op.reach.data()});
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

// Runs the sampled operations on a chunk of images for one chip, or (without a chip) those that are the same on all
// chips.
void Plan::Impl::run_operations(Worker& worker, const Images& images, int64_t chunk, Chip* chip) const {
  const int blocks = images.blocks_of(chunk);
  const Part whole{chunk, false, 0, blocks};
  for (int block = 0; block < blocks; ++block) {
    const Part part{chunk, true, block, 1};
    for (int i = 0; i < narrow; ++i) {
      const Value& v = values[i];
      if (v.sampled != (chip != nullptr)) continue;
      run_operation(worker, images, part, chip, i);
      if (v.wide.used)
        widen(address(i, worker, images, part), v.block_bytes() / kVectorBytes, block, blocks,
              address(i, worker, images, whole));
    }
  }
  for (int i = narrow; i < int(operations.size()); ++i)
    if (values[i].sampled == (chip != nullptr)) run_operation(worker, images, whole, chip, i);
}

void Plan::Impl::run_operation(Worker& worker, const Images& images, const Part& part, Chip* chip, int index) const {
  const Operation& op = *operations[index];
  const Value& out = values[index];
  const int blocks = part.blocks;
  const size_t slot = size_t(blocks) * kVectorBytes;
  const size_t pixels = size_t(out.shape.height) * out.shape.width, out_pixel = out.slots * slot;
  char* y = address(index, worker, images, part);
  if (op.kind == Kind::input) {
    const int64_t first = (part.chunk * images.chunk_blocks + part.block) * kLanes;
    return to_lanes({images.run.images_last, type, out.shape, out.slots}, images.run.images, first, images.run.count,
                    blocks, y);
  }
  const Value& in = values[op.inputs[0]];
  const char* x = address(op.inputs[0], worker, images, part);
  const size_t in_pixel = in.slots * slot;
  std::vector<ChannelRun> runs;
  switch (op.kind) {
    case Kind::input: break;
    case Kind::conv:
      // AMX multiplies what lies past the tensor by zeros: it must not be a NaN left there by other images or chips.
      if (kernels.panel_width > kPanelOutputs && !(part.narrow ? in.narrow : in.wide).kept)
        memset(address(op.inputs[0], worker, images, part) + blocks * in.block_bytes(), 0, blocks * kSlackBytes);
      run_conv(worker, chip, index, x, y, blocks);
      break;
    case Kind::pool:
      kernels.pool({x, y, blocks, out.slots, in.shape.width, out.shape.height, out.shape.width, op.rows.data(),
                    op.cols.data(), op.average, op.divisor});
      break;
    case Kind::pointwise: {
      const bool two = op.inputs.size() > 1;
      const char* b = two ? address(op.inputs[1], worker, images, part) : nullptr;
      const bool one_pixel = two && values[op.inputs[1]].shape.height * values[op.inputs[1]].shape.width == 1;
      kernels.pointwise({x, b, y, blocks, out.shape.channels, out.slots, int(pixels), op.multiply, one_pixel,
                         op.pointwise.view()});
      break;
    }
    case Kind::normalize:
      kernels.normalize({x, y, blocks, out.shape.channels, out.slots, int(pixels), op.norm_groups, op.eps,
                         op.pointwise.view()});
      break;
    case Kind::flatten: kernels.flatten({x, y, blocks, in.shape.channels, in.shape.height * in.shape.width}); break;
    case Kind::concat:
      for (size_t p = 0; p < pixels; ++p) {
        runs.clear();
        for (const Operation::Piece& piece : op.pieces) {
          const int input = op.inputs[piece.input];
          runs.push_back(
              {address(input, worker, images, part) + p * values[input].slots * slot, piece.first, piece.count});
        }
        kernels.assemble({y + p * out_pixel, runs.data(), int(runs.size()), blocks});
      }
      break;
    case Kind::pixels:
      for (size_t p = 0; p < pixels; ++p) {
        const int row = op.row_of[p / out.shape.width], col = op.col_of[p % out.shape.width];
        if (row < 0 || col < 0)
          memset(y + p * out_pixel, 0, out_pixel);
        else
          memcpy(y + p * out_pixel, x + (size_t(row) * in.shape.width + col) * in_pixel, out_pixel);
      }
      break;
    case Kind::attention: {
      const char *k = address(op.inputs[1], worker, images, part), *v = address(op.inputs[2], worker, images, part);
      kernels.attention(attention_job(index, blocks, x, k, v, y, worker.scratch.data()));
      break;
    }
    case Kind::gather: run_gather(index, blocks, x, y); break;
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
        kernels.assemble({y + p * out_pixel, runs.data(), int(runs.size()), blocks});
      }
      break;
  }
}

// Writes the outputs of a chunk, and counts its images if there are labels.
Plan::Impl::Counts Plan::Impl::collect(Worker& worker, const Images& images, int64_t chunk, int64_t sample) const {
  const Run& run = images.run;
  const Value& v = values[output];
  const Type stored = v.float_out ? Type::float32 : type;
  const int blocks = images.blocks_of(chunk);
  const int64_t first = chunk * images.chunk_blocks * kLanes, pixels = int64_t(v.shape.height) * v.shape.width;
  const char* y = address(output, worker, images, {chunk, false, 0, blocks});
  Counts counts;
  const int64_t count = std::min<int64_t>(run.count - first, blocks * kLanes);
  if (run.outputs)
    to_images({run.outputs_last, stored, v.shape, v.slots}, y, count, blocks,
              run.outputs + (sample * run.count + first) * v.shape.channels * pixels);
  for (int64_t i = 0; i < count; ++i) {
    if (run.labels) {
      int best = 0;
      float largest = from_lanes(stored, y, 0, int(i), blocks);
      bool nan = false, finite = true;
      for (int c = 0; c < v.shape.channels; ++c) {
        const float a = from_lanes(stored, y, c, int(i), blocks);
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

// ---- a whole run ----------------------------------------------------------------------------------------------------

namespace {

// Calls work(worker, item) for every item on the next free worker; each worker is a thread. The first exception ends
// all work and is rethrown here.
template <class Worker, class Work>
void share(std::vector<std::unique_ptr<Worker>>& workers, int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  on_threads(std::min(int64_t(workers.size()), items), [&](int64_t i) {
    try {
      for (int64_t item; (item = next.fetch_add(1)) < items;) work(*workers[i], item);
    } catch (...) {
      next = items;
      throw;
    }
  });
}

}  // namespace

// With fewer samples than threads the images of a sample are split, and each part draws the noise of the sample again.
// With more samples a worker runs each chunk on several chips if their weights fit its cache, so that the images stay
// in it.
Plan::Impl::Layout Plan::Impl::layout(const Run& run) const {
  if (output < 0) fail("run: the plan is not finished");
  if (run.count < 1 || run.samples.empty() || run.threads < 1 || run.chunk_blocks < 0)
    fail("run: images, samples and threads are at least 1, chunk_blocks at least 0");
  Layout l = {};
  l.blocks = (run.count + kLanes - 1) / kLanes;
  l.chunk_blocks = int(std::min<int64_t>(run.chunk_blocks ? run.chunk_blocks : kChunkBlocks, l.blocks));
  l.chunks = (l.blocks + l.chunk_blocks - 1) / l.chunk_blocks;
  const int64_t samples = int64_t(run.samples.size());
  l.parts = std::min(l.chunks, (run.threads + samples - 1) / samples);
  l.threads = std::min<int64_t>(run.threads, std::max(l.chunks, samples * l.parts));
  l.kept_offset = kept_offsets(run.keep_bytes, l.kept_bytes);
  const int64_t fitting = l.kept_bytes ? std::max<int64_t>(1, int64_t(kChipsBytes / l.kept_bytes)) : 1;
  // All workers take the same number of turns.
  const int64_t turns = (samples + l.threads * fitting - 1) / (l.threads * fitting);
  l.together = (samples + l.threads * turns - 1) / (l.threads * turns);
  return l;
}

size_t Plan::bytes(const Run& run) const {
  const Impl::Layout layout = impl_->layout(run);
  const Impl::Worker::Sizes sizes(*impl_, layout);
  size_t worker = sizes.drawn_panels + sizes.scratch + layout.together * layout.kept_bytes;
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

  Impl::Images images{run, layout.blocks, layout.chunks, layout.chunk_blocks, {}, {}};
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
    if (op.kind == Kind::attention)
      (impl_->values[i].sampled ? cost.sampled : cost.shared) +=
          4.0 * double(op.attention.tokens.size()) * op.attention.length * op.attention.heads * op.attention.width;
    if (op.kind != Kind::conv) continue;
    const auto taps = [pool = op.shape.pool](const std::vector<Taps>& all) {
      double sum = 0;
      for (size_t j = 0; j < (pool ? all.size() / 2 * 2 : all.size()); ++j) sum += all[j].last - all[j].first;
      return sum;
    };
    const double flop =
        2.0 * taps(op.rows) * taps(op.cols) * op.shape.outputs * (op.shape.channels / op.shape.conv_groups);
    (impl_->values[i].sampled ? cost.sampled : cost.shared) += flop;
    if (op.noise) cost.weights += int64_t(op.weight.size());
  }
  return cost;
}

}  // namespace correctnet
