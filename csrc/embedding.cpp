// SPDX-License-Identifier: Apache-2.0
// embedding on the CPU: checks its arguments and lists each position's and type's rows. The loops are in cpu/embedding.cpp.
#include "cpu/embedding.h"

#include "arguments.h"
#include "encoder.h"

namespace minbert {
namespace {

Embedding inputs(Arguments& a, Tensor tokens, Tensor positions, Tensor types, Tensor word, Tensor position, Tensor type,
                 Tensor gamma, double p, Tensor seed, int64_t site) {
  Embedding op{};
  op.dtype = word.dtype(), op.rows = tokens.size(0), op.width = word.size(1);
  Arguments::width(op.width);
  const auto lookup = [&](const char* table_name, Tensor table, const char* name, Tensor index, DTypes dtypes) {
    const void* rows = a.dense(table_name, table, {kAny, op.width}, dtypes);
    return Lookup{rows, table.size(0), a.indices(name, index, op.rows, op.rows, table.size(0))};
  };
  op.lookups[0] = lookup("word", word, "tokens", tokens, kActivations);
  op.lookups[1] = lookup("position", position, "positions", positions, {op.dtype});
  op.lookups[2] = lookup("type_", type, "types", types, {op.dtype});
  op.gamma = a.vector("gamma", gamma, op.width, op.dtype);
  op.dropout = a.dropout(p, seed, site);
  return op;
}

// The rows in the order of the table rows that they look up (a stable counting sort).
struct Sorted {
  std::vector<int32_t> order, offsets;

  Sorted(const Lookup& lookup, int64_t rows)
      : order(static_cast<size_t>(rows)), offsets(static_cast<size_t>(lookup.count) + 1) {
    for (int64_t row = 0; row < rows; ++row) ++offsets[static_cast<size_t>(lookup.index[row]) + 1];
    for (size_t k = 1; k < offsets.size(); ++k) offsets[k] += offsets[k - 1];
    std::vector<int32_t> next(offsets);
    for (int64_t row = 0; row < rows; ++row)
      order[static_cast<size_t>(next[static_cast<size_t>(lookup.index[row])]++)] = static_cast<int32_t>(row);
  }
};

}  // namespace

void embedding_forward(Tensor tokens, Tensor positions, Tensor types, Tensor word, Tensor position, Tensor type,
                       Tensor gamma, Tensor beta, float eps, double p, Tensor seed, int64_t site, Tensor y, Tensor mean,
                       Tensor rstd, int threads) {
  Arguments a;
  Embedding op = inputs(a, tokens, positions, types, word, position, type, gamma, p, seed, site);
  op.beta = a.vector("beta", beta, op.width, op.dtype), op.eps = eps;
  op.y = a.dense("y", y, {op.rows, op.width}, {op.dtype});
  op.mean = a.dense<float>("mean", mean, {op.rows}, {DType::f32});
  op.rstd = a.dense<float>("rstd", rstd, {op.rows}, {DType::f32});
  call_embedding_forward(op, threads);
}

// cu_seqlens is unused here: the GPU kernels find a position's rows by the sentences.
void embedding_backward(Tensor dy, Tensor tokens, Tensor positions, Tensor types, Tensor word, Tensor position,
                        Tensor type, Tensor gamma, Tensor mean, Tensor rstd, Tensor bounds, Tensor /*cu_seqlens*/,
                        Tensor word_order, Tensor word_offsets, double p, Tensor seed, int64_t site, Tensor dword,
                        Tensor dposition, Tensor d_type_table, Tensor dgamma, Tensor dbeta, int threads) {
  Arguments a;
  Embedding op = inputs(a, tokens, positions, types, word, position, type, gamma, p, seed, site);
  op.dy = a.dense("dy", dy, {op.rows, op.width}, {op.dtype});
  op.mean = a.dense<float>("mean", mean, {op.rows}, {DType::f32});
  op.rstd = a.dense<float>("rstd", rstd, {op.rows}, {DType::f32});
  op.segments = a.segments(bounds, op.rows);
  const int32_t* offsets = a.offsets("word_offsets", word_offsets, op.rows);
  const int64_t words = word_offsets.size(0) - 1, tasks = op.segments.tasks;
  const Groups by_word{a.indices("word_order", word_order, op.rows, offsets[words], op.rows), offsets, words};
  const TaskGradient dtables[] = {a.gradient("dword", dword, {tasks, words, op.width}),
                                  a.gradient("dposition", dposition, {tasks, op.lookups[1].count, op.width}),
                                  a.gradient("d_type_table", d_type_table, {tasks, op.lookups[2].count, op.width})};
  op.dgamma = a.gradient("dgamma", dgamma, {tasks, op.width});
  op.dbeta = a.gradient("dbeta", dbeta, {tasks, op.width});
  op.slots = a.floats(slot_floats(op.rows, tasks, 2, op.width)), op.dz = a.floats(op.rows * op.width);
  call_embedding_backward(op, threads);
  call_gather_sums(op, by_word, dtables[0], threads);
  for (int i = 1; i < 3; ++i) {
    const Sorted sorted(op.lookups[i], op.rows);
    const Groups groups{sorted.order.data(), sorted.offsets.data(), op.lookups[i].count};
    call_gather_sums(op, groups, dtables[i], threads);
  }
}

}  // namespace minbert
