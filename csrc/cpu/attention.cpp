// SPDX-License-Identifier: Apache-2.0
// Attention within sentences. A thread owns a (sentence, head) whole, forward and backward, so nothing is summed across
// threads. It copies its operands into scratch in the layout of cpu/matmul.h; keys and values are transposed where the
// lanes of a product run along them. A block of queries keeps its scores against every key in scratch, so the softmax is
// not an online one.
//
// n rows of the sentence, d head width; N and D the same rounded up to whole registers; W words of a row of d elements,
// rounded up too; M queries of a block.
#include "cpu/attention.h"

#include <math.h>

#include "cpu/matmul.h"

namespace minbert {
namespace MINBERT_ISA {
namespace {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// One sentence's rows: row i is base + i, or base + kept[i].
struct Sentence {
  int64_t base, count;
  const int32_t* kept;

  Sentence(const Attention& op, int64_t sentence)
      : base(op.kept ? sentence * op.period : op.offsets[sentence]),
        count(op.offsets[sentence + 1] - op.offsets[sentence]),
        kept(op.kept ? op.kept + op.offsets[sentence] : nullptr) {}

  int64_t place(int64_t i) const { return kept ? kept[i] : i; }
  int64_t row(int64_t i) const { return base + place(i); }
};

// Hands out pieces of a thread's scratch memory.
class Scratch {
 public:
  explicit Scratch(float* memory) : next_(memory) {}
  Words matrix(int64_t rows, int64_t pitch) {
    float* data = next_;
    next_ += rows * pitch;
    return {data, pitch};
  }

 private:
  float* next_;
};

// One head's part of the rows of a matrix in memory.
template <class T>
struct HeadRows {
  T* data;  // at this head in row 0
  int64_t stride, width;

  T* row(int64_t i) const { return data + i * stride; }
};

// Rows [first, first + count) of the sentence.
template <class Kind, class T>
void gather(const Sentence& s, HeadRows<const T> from, int64_t first, int64_t count, Words to) {
  for (int64_t i = 0; i < count; ++i) Kind::copy_row(from.row(s.row(first + i)), from.width, to, i);
}

template <class T>
void scatter(const Sentence& s, Words from, int64_t first, int64_t count, HeadRows<T> to) {
  for (int64_t i = 0; i < count; ++i) {
    T* row = to.row(s.row(first + i));
    const float* copy = from.row(i);
    for_columns(to.width, [&](int64_t k, auto lanes, int) { store(row + k, load(copy + k), lanes); });
  }
}

// to [pitch of from, N] = from [rows, pitch] transposed, columns beyond the rows zero.
void transpose(Words from, int64_t rows, Words to) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t k = 0; k < from.pitch; k += kLanes) {
      vfloat square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = i + r < rows ? load(from.row(i + r) + k) : vfloat{};
      transpose_square(square);
      for (int r = 0; r < kLanes; ++r) store(to.row(k + r) + i, square[r]);
    }
}

// Dropout factors of one query [n], by the places of its keys.
void draw(const Dropout& dropout, int64_t head, const Sentence& s, int64_t query, int64_t period, float* keep) {
  const DropoutRow row(dropout, static_cast<uint32_t>(head), static_cast<uint32_t>(s.row(query)));
  if (!s.kept) return row.factors(s.count, keep);
  row.factors(period, keep);
  for (int64_t i = 0; i < s.count; ++i) keep[i] = keep[s.kept[i]];  // places ascend, so none is overwritten unread
}

// Scores [n] of a query become powers 2^(scale score - top); returns log2 of the powers' sum before the shift by top, and
// the inverse of the sum after it.
struct Softmax {
  float log2_sum, inverse;
};
Softmax softmax(float* scores, int64_t n, float scale) {
  vfloat tops[kSlots];
  for (vfloat& top : tops) top = broadcast(-INFINITY);
  for_columns(n, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
    tops[slot] = larger(tops[slot], keep_lanes(load(scores + i) * scale, lanes, -INFINITY));
  });
  const float top = largest_lane(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
  Sum sum;
  for_columns(n, [&](int64_t i, auto lanes, int slot) __attribute__((always_inline)) {
    const vfloat power = keep_lanes(exp2(load(scores + i) * scale - top), lanes, 0);
    store(scores + i, power);
    sum.add(slot, power);
  });
  const float total = sum.total();
  return {top + log2f(total), 1.0f / total};
}

void multiply(float* values, const float* factors, int64_t n) {
  for_columns(n, [&](int64_t i, auto, int) { store(values + i, load(values + i) * load(factors + i)); });
}

template <class T>
void forward_head(const Attention& op, const Sentence& s, int64_t head, float* memory) {
  using Kind = typename ProductOf<T>::Kind;
  const int64_t n = s.count, d = op.head_dim, M = attention_block(n);
  const int64_t N = round_up(n, kLanes), D = round_up(d, kLanes), W = round_up(Kind::words(d), kLanes);
  Scratch scratch(memory);
  const Words keep = scratch.matrix(1, round_up(s.kept ? op.period : n, kDrawColumns));
  const Words rows = scratch.matrix(n, W), keys_t = scratch.matrix(W, N), stacked = scratch.matrix(n, D);
  const Words queries = scratch.matrix(M, W), scores = scratch.matrix(M, N), result = scratch.matrix(M, D);

  const int64_t part = op.heads * d, stride = 3 * part;
  const T* qkv = static_cast<const T*>(op.qkv) + head * d;
  const HeadRows<T> out{static_cast<T*>(op.out) + head * d, part, d};
  gather<Kind, T>(s, {qkv + part, stride, d}, 0, n, rows);
  transpose(rows, n, keys_t);
  gather<Kind, T>(s, {qkv + 2 * part, stride, d}, 0, n, rows);
  const Words values = Kind::stack(rows, n, D, stacked);

  for (int64_t first = 0; first < n; first += M) {
    const int64_t count = n - first < M ? n - first : M;
    gather<Kind, T>(s, {qkv, stride, d}, first, count, queries);
    product<Kind>(count, N, Kind::words(d), {queries.data, W, 1}, keys_t, scores);
    float inverse[kAttentionBlock];
    for (int64_t i = 0; i < count; ++i) {
      const Softmax softened = softmax(scores.row(i), n, op.scale * kLog2E);
      inverse[i] = softened.inverse;
      op.lse[head * op.rows + s.row(first + i)] = softened.log2_sum * kLn2;
      if (op.dropout.active) {
        draw(op.dropout, head, s, first + i, op.period, keep.data);
        multiply(scores.row(i), keep.data, n);
      }
      Kind::pack_row(scores.row(i), N);
    }
    product<Kind>(count, D, Kind::words(n), {scores.data, N, 1}, values, result);
    for (int64_t i = 0; i < count; ++i) {
      float* row = result.row(i);
      for_columns(D, [&](int64_t k, auto, int) { store(row + k, load(row + k) * inverse[i]); });
    }
    scatter<T>(s, result, first, count, out);
  }
}

// The scores of one query become weights [n] in `weight`, and their gradients `dscore` (before the softmax: the weights'
// own) the scores' gradients. `keep` [n] null without dropout.
void softmax_backward(float* weight, float* dscore, const float* keep, int64_t n, float scale, float lse) {
  // The saved log-sum-exp replaces the largest score. Its rounding error cancels in the division by the sum.
  const float factor = scale * kLog2E, offset = lse * kLog2E;
  Sum sum, product;
  for_columns(n, [&](int64_t j, auto lanes, int slot) __attribute__((always_inline)) {
    const vfloat w = keep_lanes(exp2(load(weight + j) * factor - offset), lanes, 0);
    const vfloat g = keep ? load(dscore + j) * load(keep + j) : load(dscore + j);
    store(weight + j, w);
    store(dscore + j, g);
    sum.add(slot, w);
    product.add(slot, w * g);
  });
  const float inverse = 1.0f / sum.total(), along = product.total() * inverse;
  for_columns(n, [&](int64_t j, auto, int) __attribute__((always_inline)) {
    const vfloat w = load(weight + j) * inverse;
    store(dscore + j, w * (load(dscore + j) - along) * scale);
    store(weight + j, keep ? w * load(keep + j) : w);
  });
}

template <class T>
void backward_head(const Attention& op, const Sentence& s, int64_t head, float* memory) {
  using Kind = typename ProductOf<T>::Kind;
  const int64_t n = s.count, d = op.head_dim, M = attention_block(n);
  const int64_t N = round_up(n, kLanes), D = round_up(d, kLanes), W = round_up(Kind::words(d), kLanes);
  Scratch scratch(memory);
  const Words keep = scratch.matrix(1, round_up(s.kept ? op.period : n, kDrawColumns));
  const Words rows = scratch.matrix(n, W), keys_t = scratch.matrix(W, N), values_t = scratch.matrix(W, N);
  const Words keys_stacked = scratch.matrix(n, D), dkeys = scratch.matrix(n, D), dvalues = scratch.matrix(n, D);
  const Words queries = scratch.matrix(M, W), queries_stacked = scratch.matrix(M, D);
  const Words cotangents = scratch.matrix(M, W), cotangents_stacked = scratch.matrix(M, D);
  const Words weights = scratch.matrix(M, N), dscores = scratch.matrix(M, N), dqueries = scratch.matrix(M, D);
  const Words weights_stacked = scratch.matrix(M, N), dscores_stacked = scratch.matrix(M, N);

  const int64_t part = op.heads * d, stride = 3 * part;
  const T* qkv = static_cast<const T*>(op.qkv) + head * d;
  const HeadRows<const T> dout{static_cast<const T*>(op.dout) + head * d, part, d};
  T* gradient = static_cast<T*>(op.dqkv) + head * d;
  gather<Kind, T>(s, {qkv + 2 * part, stride, d}, 0, n, rows);
  transpose(rows, n, values_t);
  gather<Kind, T>(s, {qkv + part, stride, d}, 0, n, rows);
  transpose(rows, n, keys_t);
  const Words keys = Kind::stack(rows, n, D, keys_stacked);

  for (int64_t first = 0; first < n; first += M) {
    const int64_t count = n - first < M ? n - first : M;
    gather<Kind, T>(s, {qkv, stride, d}, first, count, queries);
    gather<Kind, T>(s, dout, first, count, cotangents);
    product<Kind>(count, N, Kind::words(d), {queries.data, W, 1}, keys_t, weights);
    product<Kind>(count, N, Kind::words(d), {cotangents.data, W, 1}, values_t, dscores);
    for (int64_t i = 0; i < count; ++i) {
      if (op.dropout.active) draw(op.dropout, head, s, first + i, op.period, keep.data);
      softmax_backward(weights.row(i), dscores.row(i), op.dropout.active ? keep.data : nullptr, n, op.scale,
                       op.lse[head * op.rows + s.row(first + i)]);
      Kind::pack_row(weights.row(i), N);
      Kind::pack_row(dscores.row(i), N);
    }
    const Words weights_t = Kind::stack(weights, count, N, weights_stacked);
    const Words dscores_t = Kind::stack(dscores, count, N, dscores_stacked);
    const int64_t depth = Kind::words(count);
    product<Kind>(n, D, depth, {weights_t.data, 1, N}, Kind::stack(cotangents, count, D, cotangents_stacked), dvalues,
                  first > 0);
    product<Kind>(n, D, depth, {dscores_t.data, 1, N}, Kind::stack(queries, count, D, queries_stacked), dkeys,
                  first > 0);
    product<Kind>(count, D, Kind::words(n), {dscores.data, N, 1}, keys, dqueries);
    scatter<T>(s, dqueries, first, count, {gradient, stride, d});
  }
  scatter<T>(s, dkeys, 0, n, {gradient + part, stride, d});
  scatter<T>(s, dvalues, 0, n, {gradient + 2 * part, stride, d});
}

// body(row) for every row that belongs to no sentence.
template <class Body>
void for_absent_rows(const Attention& op, const Body& body) {
  if (!op.kept) {
    for (int64_t row = op.offsets[op.sentences]; row < op.rows; ++row) body(row);
    return;
  }
  for (int64_t sentence = 0; sentence < op.sentences; ++sentence) {
    const Sentence s(op, sentence);
    for (int64_t place = 0, next = 0; place < op.period; ++place) {
      if (next < s.count && s.kept[next] == place)
        ++next;
      else
        body(s.base + place);
    }
  }
}

// body(sentence, head, scratch) for every head of every sentence, by the plan.
template <class Body>
void for_heads(const Attention& op, int threads, const Body& body) {
  parallel_for(op.count, threads, [&](int64_t i) {
    const AttentionItem& item = op.items[i];
    const Sentence sentence(op, item.sentence);
    for (int64_t head = item.first; head < item.last; ++head)
      body(sentence, head, op.scratch + thread_number() * op.pitch);
  });
}

}  // namespace

void attention_forward(const Attention& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t part = op.heads * op.head_dim;
    for_absent_rows(op, [&](int64_t row) {
      std::memset(static_cast<T*>(op.out) + row * part, 0, static_cast<size_t>(part) * sizeof(T));
      for (int64_t head = 0; head < op.heads; ++head) op.lse[head * op.rows + row] = 0;
    });
    for_heads(op, threads, [&](const Sentence& s, int64_t head, float* memory) { forward_head<T>(op, s, head, memory); });
  });
}

void attention_backward(const Attention& op, int threads) {
  with_element(op.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t stride = 3 * op.heads * op.head_dim;
    for_absent_rows(op, [&](int64_t row) {
      std::memset(static_cast<T*>(op.dqkv) + row * stride, 0, static_cast<size_t>(stride) * sizeof(T));
    });
    for_heads(op, threads, [&](const Sentence& s, int64_t head, float* memory) { backward_head<T>(op, s, head, memory); });
  });
}

}  // namespace MINBERT_ISA
}  // namespace minbert
