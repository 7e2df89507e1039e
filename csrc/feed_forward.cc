#include "feed_forward.h"

#include <algorithm>

#include "pool.h"
#include "scratch.h"

namespace dybit {
namespace {

// Rows that a thread takes at a time: enough to pay for unpacking the weights, and few enough that the results between
// the products stay in the cache.
constexpr int64_t kMostRows = 256, kFewestRows = 32, kHiddenBytes = int64_t(3) << 20;

void multiply(const Product& p, const float* x, int64_t rows, float* y, int threads, Activation activation) {
  p.weight->linear(x, rows, y, p.bias, p.scale, p.offset, p.reach, threads, activation);
}

}  // namespace

void feed_forward(const Product& first, const Product* second, const Product& down, Activation activation,
                  const float* x, int64_t rows, float* y, int threads) {
  const int64_t columns = first.weight->weight().columns, width = down.weight->weight().columns;
  const int64_t outputs = down.weight->weight().rows;
  const auto some = [&](int64_t from, int64_t count, int threads) {
    static thread_local Scratch hidden_memory;
    float* const hidden = hidden_memory.take<float>(count * width * (second ? 2 : 1));
    multiply(first, x + from * columns, count, hidden, threads, activation);
    if (second) {
      float* const other = hidden + count * width;
      multiply(*second, x + from * columns, count, other, threads, Activation::kNone);
      for (int64_t i = 0; i < count * width; ++i) hidden[i] *= other[i];
    }
    multiply(down, hidden, count, y + from * outputs, threads, Activation::kNone);
  };
  const int64_t fit = kHiddenBytes / int64_t(sizeof(float) * width * (second ? 2 : 1));
  const int64_t most = std::clamp(fit, kFewestRows, kMostRows);
  const int64_t parts = std::max<int64_t>(1, (rows + most * threads - 1) / (most * threads) * threads);
  if (threads > 1 && rows < parts * kFewestRows) return some(0, rows, threads);
  parallel_for(int(parts), threads, [&](int i) {
    const int64_t from = i * rows / parts;
    some(from, (i + 1) * rows / parts - from, 1);
  });
}

}  // namespace dybit
