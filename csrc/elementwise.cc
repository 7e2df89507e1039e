#include "elementwise.h"

#include <algorithm>

#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"

namespace dybit {
namespace {

constexpr int64_t kPiece = 32768;  // numbers for a thread

// Calls work(first, count) for pieces of about kPiece numbers of `count` rows.
template <class F>
void in_pieces(int64_t count, int64_t columns, int threads, F&& work) {
  const int64_t piece = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, columns));
  parallel_for(int((count + piece - 1) / piece), threads, [&](int i) {
    const int64_t first = i * piece;
    work(first, std::min(piece, count - first));
  });
}

}  // namespace

void unary(Unary kind, const float* x, int64_t count, float* y, int threads) {
  const RowKernels& rows = *kernels().rows;
  in_pieces(count, 1, threads, [&](int64_t first, int64_t some) { rows.unary(kind, x + first, some, y + first); });
}

void clamp(const float* x, int64_t count, float low, float high, float* y, int threads) {
  const RowKernels& rows = *kernels().rows;
  in_pieces(count, 1, threads,
            [&](int64_t first, int64_t some) { rows.clamp(x + first, some, low, high, y + first); });
}

void binary(Binary kind, const std::array<int64_t, 3>& sizes, const Operand& a, const Operand& b, float* y,
            const std::array<int64_t, 3>& y_strides, int threads) {
  std::array<int64_t, 3> size = sizes;
  Operand operands[] = {a, b, {y, y_strides}};
  // Joins the last two dimensions where all strides allow it: rows get longer.
  auto joined_stride = [&](const Operand& o) -> int64_t {  // or -1
    if (size[1] == 1) return o.strides[2];
    if (size[2] == 1) return o.strides[1] <= 1 ? o.strides[1] : -1;
    return o.strides[1] == o.strides[2] * size[2] ? o.strides[2] : -1;
  };
  for (int joined = 0; joined < 2; ++joined) {
    if (!std::all_of(std::begin(operands), std::end(operands), [&](auto& o) { return joined_stride(o) >= 0; })) break;
    for (Operand& o : operands) o.strides = {0, o.strides[0], joined_stride(o)};
    size = {1, size[0], size[1] * size[2]};
  }
  if (size[0] * size[1] * size[2] == 0) return;
  const RowKernels& rows = *kernels().rows;
  const int64_t columns = std::min(size[2], kPiece), parts = (size[2] + columns - 1) / columns;
  // Units are parts of rows, counted by the first dimension, part and row: neighbours are rows of one call.
  in_pieces(size[0] * parts * size[1], columns, threads, [&](int64_t unit, int64_t count) {
    for (const int64_t end = unit + count; unit < end;) {
      const int64_t row = unit % size[1], start = unit / size[1] % parts * columns, outer = unit / size[1] / parts;
      const int64_t some = std::min(end - unit, size[1] - row);
      const auto& [first, second, result] = operands;
      auto offset = [&](const Operand& o) { return outer * o.strides[0] + row * o.strides[1] + start * o.strides[2]; };
      rows.binary(kind, {first.data + offset(first), first.strides[1], first.strides[2], second.data + offset(second),
                         second.strides[1], second.strides[2], y + offset(result), result.strides[1], some,
                         std::min(columns, size[2] - start)});
      unit += some;
    }
  });
}

void scale_columns(const ColumnScales& scales, const float* x, int64_t rows, float* y, int threads) {
  const RowKernels& kernels = *dybit::kernels().rows;
  in_pieces(rows, scales.columns, threads, [&](int64_t first, int64_t count) {
    kernels.scale_columns(scales, x + first * scales.columns, count, y + first * scales.columns);
  });
}

void fold_rows(Fold kind, const float* x, int64_t stride, int64_t rows, int columns, float* y, int threads) {
  const RowKernels& kernels = *dybit::kernels().rows;
  in_pieces(rows, columns, threads, [&](int64_t first, int64_t count) {
    kernels.fold_rows(kind, x + first * stride, stride, count, columns, y + first);
  });
}

void softmax(const float* x, int64_t rows, int columns, float* y, int threads) {
  if (columns == 0) return;
  const RowKernels& kernels = *dybit::kernels().rows;
  in_pieces(rows, columns, threads, [&](int64_t first, int64_t count) {
    kernels.softmax(x + first * columns, count, columns, y + first * columns);
  });
}

}  // namespace dybit
