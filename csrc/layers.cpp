// SPDX-License-Identifier: Apache-2.0
// The encoder's operations on the CPU: what index tensors hold is checked, scratch memory made and work planned here;
// the loops are in csrc/cpu.
#include "layers.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/column_sums.h"
#include "cpu/layer_kernels.h"

namespace minbert {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float, Free>;

// Uninitialised memory, aligned to the largest register.
Floats floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  Floats memory(static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

// values [count + 1] must ascend from 0 to at most `limit`.
void check_offsets(const int32_t* values, int64_t count, int64_t limit, const char* name) {
  if (values[0] != 0) throw std::invalid_argument(std::string(name) + " must begin with 0");
  for (int64_t i = 0; i < count; ++i)
    if (values[i + 1] < values[i])
      throw std::invalid_argument(std::string(name) + " must not descend, but entry " + std::to_string(i + 1) + " does");
  if (values[count] > limit)
    throw std::invalid_argument(std::string(name) + " ends with " + std::to_string(values[count]) + ", but there are " +
                                std::to_string(limit) + " rows");
}

void check_indices(const int32_t* values, int64_t count, int64_t limit, const char* name) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(values[i]) + ", which is not in [0, " +
                                  std::to_string(limit) + ")");
}

void check(const Segments& segments, int64_t rows) { check_offsets(segments.bounds, segments.tasks, rows, "bounds"); }

void check(const Embedding& op) {
  const char* names[] = {"tokens", "positions", "types"};
  for (int i = 0; i < 3; ++i) check_indices(op.lookups[i].index, op.rows, op.lookups[i].count, names[i]);
}

}  // namespace

void add_norm_forward(const AddNorm& op, const float* beta, float eps, void* y, float* mean, float* rstd, int threads) {
  call_add_norm_rows(op, beta, eps, y, mean, rstd, threads);
}

void add_norm_backward(const AddNorm& op, const void* dy, const float* mean, const float* rstd, const Segments& segments,
                       void* dx, void* dresidual, const TaskGradient& dgamma, const TaskGradient& dbeta,
                       const TaskGradient& dbias, int threads) {
  check(segments, op.rows);
  const Floats slots = floats(slot_floats(op.rows, segments.tasks, 3, op.width));
  call_add_norm_rows_backward(op, dy, mean, rstd, segments, dx, dresidual, dgamma, dbeta, dbias, slots.get(), threads);
}

void bias_gelu_forward(const BiasGelu& op, void* y, int threads) { call_bias_gelu_rows(op, y, threads); }

void bias_gelu_backward(const BiasGelu& op, const void* dy, const Segments& segments, void* dx,
                        const TaskGradient& dbias, int threads) {
  check(segments, op.rows);
  const Floats slots = floats(slot_floats(op.rows, segments.tasks, 1, op.width));
  call_bias_gelu_rows_backward(op, dy, segments, dx, dbias, slots.get(), threads);
}

void embedding_forward(const Embedding& op, const float* beta, float eps, void* y, float* mean, float* rstd,
                       int threads) {
  check(op);
  call_embedding_rows(op, beta, eps, y, mean, rstd, threads);
}

void embedding_backward(const Embedding& op, const void* dy, const float* mean, const float* rstd,
                        const Segments& segments, const int32_t* word_order, const int32_t* word_offsets, int64_t words,
                        const TaskGradient& dgamma, const TaskGradient& dbeta, const TaskGradient (&dtables)[3],
                        int threads) {
  check(op);
  check(segments, op.rows);
  check_offsets(word_offsets, words, op.rows, "word_offsets");
  check_indices(word_order, word_offsets[words], op.rows, "word_order");
  const Floats slots = floats(slot_floats(op.rows, segments.tasks, 2, op.width)), dz = floats(op.rows * op.width);
  call_embedding_rows_backward(op, dy, mean, rstd, segments, dz.get(), dgamma, dbeta, slots.get(), threads);
  call_gather_sums(dz.get(), op.width, Groups{word_order, word_offsets, words}, segments, dtables[0], threads);
  for (int i = 1; i < 3; ++i) {  // rows by position, then by type: a stable counting sort
    const Lookup& lookup = op.lookups[i];
    std::vector<int32_t> order(static_cast<size_t>(op.rows)), offsets(static_cast<size_t>(lookup.count) + 1);
    for (int64_t row = 0; row < op.rows; ++row) ++offsets[static_cast<size_t>(lookup.index[row]) + 1];
    for (size_t k = 1; k < offsets.size(); ++k) offsets[k] += offsets[k - 1];
    std::vector<int32_t> next(offsets);
    for (int64_t row = 0; row < op.rows; ++row)
      order[static_cast<size_t>(next[static_cast<size_t>(lookup.index[row])]++)] = static_cast<int32_t>(row);
    call_gather_sums(dz.get(), op.width, Groups{order.data(), offsets.data(), lookup.count}, segments, dtables[i],
                     threads);
  }
}

void column_sums(const ColumnSums& op, const Segments& segments, const TaskGradient& out, int threads) {
  check(segments, op.rows);
  const Floats slots = floats(slot_floats(op.rows, segments.tasks, 1, op.width));
  call_column_sums_rows(op, segments, out, slots.get(), threads);
}

namespace {

// Work for threads, the most expensive first: a short sentence with all its heads (they share cache lines and pages),
// a long one by single heads. Made from the lengths alone.
class Plan {
 public:
  Plan(const Attention& op, int threads) {
    check_offsets(op.offsets, op.sentences, op.rows, "cu_seqlens");
    constexpr int64_t kWork = int64_t{1} << 21;  // multiplications of one product: some 50 microseconds
    int64_t longest = 0;
    for (int64_t b = 0; b < op.sentences; ++b) {
      const int64_t n = op.offsets[b + 1] - op.offsets[b];
      if (n == 0) continue;
      longest = std::max(longest, n);
      const int64_t heads = std::clamp<int64_t>(kWork / (n * n * op.head_dim), 1, op.heads);
      for (int64_t first = 0; first < op.heads; first += heads)
        items_.push_back({static_cast<int32_t>(b), static_cast<int32_t>(first),
                          static_cast<int32_t>(std::min(first + heads, op.heads))});
    }
    const auto cost = [&](const AttentionItem& item) {
      const int64_t n = op.offsets[item.sentence + 1] - op.offsets[item.sentence];
      return n * n * (item.last - item.first);
    };
    std::stable_sort(items_.begin(), items_.end(),
                     [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
    pitch_ = attention_scratch(longest, op.kept ? op.period : longest, op.head_dim);
    scratch_ = floats(pitch_ * threads);
  }

  operator AttentionPlan() const {
    return {items_.data(), static_cast<int64_t>(items_.size()), scratch_.get(), pitch_};
  }

 private:
  std::vector<AttentionItem> items_;
  int64_t pitch_;
  Floats scratch_;
};

}  // namespace

KeptRows::KeptRows(const uint8_t* mask, int64_t sentences, int64_t period) {
  offsets.push_back(0);
  for (int64_t sentence = 0; sentence < sentences; ++sentence) {
    for (int64_t place = 0; place < period; ++place)
      if (mask[sentence * period + place]) kept.push_back(static_cast<int32_t>(place));
    offsets.push_back(static_cast<int32_t>(kept.size()));
  }
}

void attention_forward(const Attention& op, void* out, float* lse, int threads) {
  call_attention_items(op, Plan(op, threads), out, lse, threads);
}

void attention_backward(const Attention& op, const void* dout, int64_t dout_stride, const float* lse, void* dqkv,
                        int threads) {
  call_attention_items_backward(op, Plan(op, threads), dout, dout_stride, lse, dqkv, threads);
}

}  // namespace minbert
