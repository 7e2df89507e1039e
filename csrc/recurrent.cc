#include "recurrent.h"

#include <algorithm>
#include <cstring>

#include "dispatch.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

void add(const float* x, int64_t count, float* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += x[i];
}

// own: the product with the states, and its bias; overwritten. Each function computes the next states of one sequence.

void lstm(const RowKernels& rows, const float* x, float* own, int64_t size, float* h, float* c) {
  add(x, 4 * size, own);
  float *first = own, *forget = own + size, *cell = own + 2 * size, *out = own + 3 * size;
  rows.unary(Unary::kSigmoid, first, 2 * size, first);
  rows.unary(Unary::kTanh, cell, size, cell);
  rows.unary(Unary::kSigmoid, out, size, out);
  for (int64_t i = 0; i < size; ++i) {
    const float kept = forget[i] * c[i], added = first[i] * cell[i];
    c[i] = kept + added;
  }
  rows.unary(Unary::kTanh, c, size, cell);
  for (int64_t i = 0; i < size; ++i) h[i] = out[i] * cell[i];
}

void gru(const RowKernels& rows, const float* x, float* own, int64_t size, float* h) {
  add(x, 2 * size, own);
  float *reset = own, *update = own + size, *made = own + 2 * size;
  rows.unary(Unary::kSigmoid, own, 2 * size, own);
  for (int64_t i = 0; i < size; ++i) {
    const float recalled = reset[i] * made[i];
    made[i] = x[2 * size + i] + recalled;
  }
  rows.unary(Unary::kTanh, made, size, made);
  for (int64_t i = 0; i < size; ++i) {
    const float kept = update[i] * (h[i] - made[i]);
    h[i] = made[i] + kept;
  }
}

void plain(const RowKernels& rows, Cell cell, const float* x, float* own, int64_t size, float* h) {
  add(x, size, own);
  rows.unary(cell == Cell::kTanh ? Unary::kTanh : Unary::kRelu, own, size, h);
}

}  // namespace

void recur(const RecurrentTask& task, int threads) {
  static thread_local Scratch own_memory;
  const RowKernels& rows = *kernels().rows;
  const int64_t size = task.weight->weight().columns, wide = task.weight->weight().rows;
  int64_t most = 0, all = 0;
  for (int64_t t = 0; t < task.steps; ++t) all += task.counts[t], most = std::max(most, task.counts[t]);
  auto* own = own_memory.take<float>(size_t(most * wide));
  int64_t at = task.reverse ? all : 0;
  for (int64_t t = 0; t < task.steps; ++t) {
    const int64_t count = task.counts[task.reverse ? task.steps - 1 - t : t];
    if (task.reverse) at -= count;
    task.weight->linear(task.h, count, own, task.bias, task.scale.scale, task.scale.offset, task.scale.reach, threads);
    for (int64_t i = 0; i < count; ++i) {
      const float* x = task.x + (at + i) * wide;
      float *mine = own + i * wide, *h = task.h + i * size;
      if (task.cell == Cell::kLstm)
        lstm(rows, x, mine, size, h, task.c + i * size);
      else if (task.cell == Cell::kGru)
        gru(rows, x, mine, size, h);
      else
        plain(rows, task.cell, x, mine, size, h);
    }
    if (task.y) std::memcpy(task.y + at * size, task.h, size_t(count * size) * sizeof(float));
    if (!task.reverse) at += count;
  }
}

}  // namespace dybit
