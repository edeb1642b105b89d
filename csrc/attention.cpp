// SPDX-License-Identifier: Apache-2.0
// attention on the CPU: checks its arguments and divides its work among threads. The loops are in cpu/attention.cpp.
#include "cpu/attention.h"

#include <algorithm>
#include <stdexcept>

#include "arguments.h"
#include "encoder.h"

namespace minbert {
namespace {

// The op and the lists that it points to.
class Plan {
 public:
  Attention op{};
  Arguments a;

  Plan(Tensor qkv, Tensor cu_seqlens, Tensor mask, float scale, double p, Tensor seed, int64_t site, int threads) {
    op.qkv = a.dense("qkv", qkv, {kAny, 3, kAny, kAny}, kActivations);
    op.dtype = qkv.dtype(), op.rows = qkv.size(0), op.heads = qkv.size(2), op.head_dim = qkv.size(3);
    op.scale = scale;
    op.dropout = a.dropout(p, seed, site);
    if (mask)
      keep_rows(mask);
    else
      op.offsets = a.offsets("cu_seqlens", cu_seqlens, op.rows), op.sentences = cu_seqlens.size(0) - 1;
    share(threads);
  }

 private:
  void keep_rows(Tensor mask) {
    op.sentences = mask.size(0), op.period = mask.size(1);
    const bool* attended = a.dense<bool>("mask", mask, {kAny, op.period}, {DType::boolean});
    if (op.sentences * op.period != op.rows) throw std::invalid_argument("mask must have one element a row of qkv");
    offsets_.push_back(0);
    for (int64_t sentence = 0; sentence < op.sentences; ++sentence) {
      for (int64_t place = 0; place < op.period; ++place)
        if (attended[sentence * op.period + place]) kept_.push_back(static_cast<int32_t>(place));
      offsets_.push_back(static_cast<int32_t>(kept_.size()));
    }
    kept_.push_back(0);  // so that data() is not null, which would mean packed rows
    op.offsets = offsets_.data(), op.kept = kept_.data();
  }

  // Makes the threads' items, the most expensive first: a short sentence with all its heads (which share cache lines and
  // pages), or one head of a long sentence. Only the lengths decide.
  void share(int threads) {
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
                     [&](const AttentionItem& x, const AttentionItem& y) { return cost(x) > cost(y); });
    op.items = items_.data(), op.count = static_cast<int64_t>(items_.size());
    op.pitch = attention_scratch(longest, op.kept ? op.period : longest, op.head_dim);
    op.scratch = a.floats(op.pitch * threads);
  }

  std::vector<AttentionItem> items_;
  std::vector<int32_t> offsets_, kept_;
};

}  // namespace

// max_seqlen is unused here: the GPU kernels choose their tiles by it.
void attention_forward(Tensor qkv, Tensor cu_seqlens, Tensor mask, int64_t /*max_seqlen*/, float scale, double p,
                       Tensor seed, int64_t site, Tensor out, Tensor lse, int threads) {
  Plan plan(qkv, cu_seqlens, mask, scale, p, seed, site, threads);
  Attention& op = plan.op;
  op.out = plan.a.dense("out", out, {op.rows, op.heads * op.head_dim}, {op.dtype});
  op.lse = plan.a.dense<float>("lse", lse, {op.heads, op.rows}, {DType::f32});
  call_attention_forward(op, threads);
}

void attention_backward(Tensor dout, Tensor qkv, Tensor /*out*/, Tensor lse, Tensor cu_seqlens, Tensor mask,
                        int64_t /*max_seqlen*/, float scale, double p, Tensor seed, int64_t site, Tensor dqkv,
                        int threads) {
  Plan plan(qkv, cu_seqlens, mask, scale, p, seed, site, threads);
  Attention& op = plan.op;
  op.dout = plan.a.dense("dout", dout, {op.rows, op.heads * op.head_dim}, {op.dtype});
  op.lse = plan.a.dense<float>("lse", lse, {op.heads, op.rows}, {DType::f32});
  op.dqkv = plan.a.dense("dqkv", dqkv, {op.rows, 3, op.heads, op.head_dim}, {op.dtype});
  call_attention_backward(op, threads);
}

}  // namespace minbert
