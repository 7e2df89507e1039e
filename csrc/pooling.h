// Pooling of channels-last FP32 images. All instruction sets give the same bits.
#pragma once

#include <array>
#include <cstdint>

namespace dybit {

// Images [images][height][width][channels], the channels contiguous. Strides are of images, rows and pixels.
struct PoolTask {
  int images, channels;
  std::array<int, 2> size;     // height and width of x
  std::array<int, 2> outputs;  // height and width of y
  const float* x;
  std::array<int64_t, 3> x_strides;
  float* y;  // not x
  std::array<int64_t, 3> y_strides;
};

// By height and width. Output i covers the inputs i · stride − padding + j · dilation, 0 ≤ j < kernel, that exist.
struct PoolWindow {
  std::array<int, 2> kernel, stride, padding, dilation;
};

// NaN if a number is NaN; −∞ of no numbers.
void max_pool(const PoolTask& task, const PoolWindow& window, int threads);

// The sum by `divisor`; if it is 0, by the count of numbers, which may include padding. dilation is 1.
void average_pool(const PoolTask& task, const PoolWindow& window, bool count_include_pad, int divisor, int threads);

// Output i of n is the mean of the inputs from ⌊i · size / n⌋ to ⌈(i + 1) · size / n⌉. With one output, the mean of all.
void adaptive_average_pool(const PoolTask& task, int threads);

}  // namespace dybit
