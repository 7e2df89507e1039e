#include "pooling.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"

namespace dybit {
namespace {

constexpr int64_t kPiece = 32768;  // numbers for a thread

// Places of a window along one dimension: those inside the image, and how many there are with padding.
struct Span {
  int first, count, padded;
};

std::vector<Span> spans(const PoolTask& task, const PoolWindow& window, int d) {
  const int size = task.size[d], padding = window.padding[d], step = window.dilation[d];
  std::vector<Span> result;
  for (int i = 0; i < task.outputs[d]; ++i) {
    const int start = i * window.stride[d] - padding, end = start + window.kernel[d] * step;
    const int first = start < 0 ? start + (step - 1 - start) / step * step : start;
    const int count = std::max(0, (std::min(size, end) - first + step - 1) / step);
    result.push_back({first, count, std::min(end, size + padding) - start});
  }
  return result;
}

std::vector<Span> adaptive_spans(const PoolTask& task, int d) {
  const int64_t size = task.size[d], outputs = task.outputs[d];
  std::vector<Span> result;
  for (int64_t i = 0; i < outputs; ++i) {
    const int first = int(i * size / outputs), count = int(((i + 1) * size + outputs - 1) / outputs) - first;
    result.push_back({first, count, count});
  }
  return result;
}

// Calls reduce(block, height, width, y) for each output, the block being that of its window.
template <class F>
void run(const PoolTask& task, const std::vector<Span>& heights, const std::vector<Span>& widths, int row_step,
         int column_step, int threads, F&& reduce) {
  if (widths.empty() || heights.empty() || task.channels == 0) return;
  const int rows = task.images * task.outputs[0];
  const int64_t work = int64_t(task.outputs[1]) * heights[0].count * widths[0].count * task.channels;
  const int piece = int(std::max<int64_t>(1, kPiece / std::max<int64_t>(work, 1)));
  const auto& x = task.x_strides;
  const auto& y = task.y_strides;
  parallel_for((rows + piece - 1) / piece, threads, [&](int i) {
    for (int row = i * piece; row < std::min(rows, (i + 1) * piece); ++row) {
      const int image = row / task.outputs[0], place = row % task.outputs[0];
      const Span& height = heights[place];
      for (int column = 0; column < task.outputs[1]; ++column) {
        const Span& width = widths[column];
        const PoolBlock block{task.x + image * x[0] + height.first * x[1] + width.first * x[2],
                              height.count, width.count, row_step * x[1], column_step * x[2], task.channels};
        reduce(block, height, width, task.y + image * y[0] + place * y[1] + column * y[2]);
      }
    }
  });
}

}  // namespace

void max_pool(const PoolTask& task, const PoolWindow& window, int threads) {
  const RowKernels& rows = *kernels().rows;
  run(task, spans(task, window, 0), spans(task, window, 1), window.dilation[0], window.dilation[1], threads,
      [&](const PoolBlock& block, const Span&, const Span&, float* y) { rows.largest(block, y); });
}

void average_pool(const PoolTask& task, const PoolWindow& window, bool count_include_pad, int divisor, int threads) {
  const RowKernels& rows = *kernels().rows;
  run(task, spans(task, window, 0), spans(task, window, 1), 1, 1, threads,
      [&](const PoolBlock& block, const Span& height, const Span& width, float* y) {
        const int64_t padded = int64_t(height.padded) * width.padded, inside = int64_t(height.count) * width.count;
        rows.mean(block, float(divisor ? divisor : count_include_pad ? padded : inside), y);
      });
}

void adaptive_average_pool(const PoolTask& task, int threads) {
  const RowKernels& rows = *kernels().rows;
  run(task, adaptive_spans(task, 0), adaptive_spans(task, 1), 1, 1, threads,
      [&](const PoolBlock& block, const Span& height, const Span& width, float* y) {
        rows.mean(block, float(int64_t(height.count) * width.count), y);
      });
}

}  // namespace dybit
