// Operations of transformers in a plan: attention, and values whose pixels are rearranged and added to constants.
#include <algorithm>

#include "plan/plan_impl.h"

namespace correctnet {

int Plan::attention(int q, int k, int v, const Attention& attention) {
  const Attention& a = attention;
  const Shape in = impl_->value(q).shape;
  const int inputs[3] = {q, k, v};
  if (a.heads < 1 || a.width < 2 || a.width % 2) fail("attention: there are heads, each of an even number of channels");
  for (int i = 0; i < 3; ++i) {
    const Shape other = impl_->value(inputs[i]).shape;
    if (other.height != in.height || other.width != in.width) fail("attention: two shapes that differ");
    if (a.first[i] < 0 || a.first[i] % 2 || int64_t(a.first[i]) + int64_t(a.heads) * a.width > other.channels)
      fail("attention: the heads begin at an even channel, and end within the channels");
  }
  const size_t pixels = size_t(in.height) * in.width, length = size_t(std::max(a.length, 0));
  std::vector<int> sorted = a.tokens;
  std::sort(sorted.begin(), sorted.end());
  bool each = length > 0 && sorted.size() == pixels && pixels % length == 0;
  for (size_t i = 0; each && i < pixels; ++i) each = sorted[i] == int(i);
  if (!each) fail("attention: every pixel is one token of a group");
  if (!a.bias.empty() && a.bias.size() != a.heads * length * length) fail("attention: bias is (heads, length, length)");
  if (!a.mask.empty() && a.mask.size() != pixels * length) fail("attention: mask is (groups, length, length)");

  auto op = std::make_unique<Operation>();
  op->kind = Kind::attention;
  op->inputs = {q, k, v};
  op->attention = a;
  op->scratch = sizeof(float) * kLanes *
                ((2 * length + kPanelOutputs + kAttentionQueries) * size_t(a.width) + kAttentionQueries * length);
  return impl_->append(std::move(op), {a.heads * a.width, in.height, in.width});
}

AttentionJob Plan::Impl::attention_job(int index, int blocks, const char* q, const char* k, const char* v, char* y,
                                       char* scratch) const {
  const Operation& op = *operations[index];
  const Attention& a = op.attention;
  AttentionJob job = {};
  job.q = q, job.k = k, job.v = v, job.y = y;
  job.image_blocks = blocks;
  job.q_slots = values[op.inputs[0]].slots, job.k_slots = values[op.inputs[1]].slots;
  job.v_slots = values[op.inputs[2]].slots, job.out_slots = values[index].slots;
  job.q_first = a.first[0], job.k_first = a.first[1], job.v_first = a.first[2];
  job.heads = a.heads, job.width = a.width;
  job.tokens = a.tokens.data();
  job.groups = int(a.tokens.size()) / a.length, job.length = a.length;
  job.scale = a.scale;
  job.bias = a.bias.empty() ? nullptr : a.bias.data();
  job.mask = a.mask.empty() ? nullptr : a.mask.data();
  job.scratch = scratch;
  return job;
}

int Plan::gather(int x, int height, int width, const std::vector<int>& from, const std::vector<float>& constant) {
  const Shape in = impl_->value(x).shape;
  if (height < 1 || width < 1 || from.size() != size_t(height) * width) fail("gather: one pixel of x for each");
  for (int pixel : from)
    if (pixel < -1 || pixel >= in.height * in.width) fail("gather: there is no pixel " + std::to_string(pixel));
  if (!constant.empty() && constant.size() != from.size() * in.channels) fail("gather: constant is (pixels, channels)");
  auto op = std::make_unique<Operation>();
  op->kind = Kind::gather;
  op->inputs = {x};
  op->from = from;
  op->pointwise = PaddedPointwise({}, in.channels);
  const size_t padded = op->pointwise.shift.size();
  for (size_t p = 0; p < from.size() && !constant.empty(); ++p) {
    op->constant.insert(op->constant.end(), &constant[p * in.channels], &constant[p * in.channels] + in.channels);
    op->constant.resize((p + 1) * padded);
  }
  return impl_->append(std::move(op), {in.channels, height, width});
}

void Plan::Impl::run_gather(int index, int blocks, const char* x, char* y) const {
  const Operation& op = *operations[index];
  const Value& out = values[index];
  const size_t bytes = size_t(out.slots) * blocks * kVectorBytes, padded = op.pointwise.shift.size();
  for (size_t p = 0; p < op.from.size(); ++p, y += bytes) {
    const char* pixel = op.from[p] < 0 ? y : x + op.from[p] * bytes;
    if (op.from[p] < 0) memset(y, 0, bytes);
    if (op.constant.empty()) {
      if (pixel != y) memcpy(y, pixel, bytes);
      continue;
    }
    Epilogue epilogue = op.pointwise.view();
    epilogue.shift = &op.constant[p * padded];
    kernels.pointwise({pixel, nullptr, y, blocks, out.shape.channels, out.slots, 1, false, false, epilogue});
  }
}

}  // namespace correctnet
