// The steps of a convolution that every instruction set implements (CodeKernels in codes.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace dybit {

// Copies `bytes` from the image to a row of the product.
struct GatherRun {
  int to;
  int64_t from;
  int bytes;
};

// Gathers rows of the product from an image, or only sums rows that already lie as the product reads them.
struct GatherTask {
  const uint8_t* image;
  const GatherRun* runs;
  int run_count;
  const Segment* segments;
  int segment_count;
  int element_bytes;
  size_t row_bytes;
};

// One line of outputs of a convolution with one channel per group. Sums of products are FP32, exact below 2^24.
struct DepthwiseTask {
  const float* weights;         // [taps][padded_channels]
  const float* scales;          // [padded_channels]
  const float* bias;            // [padded_channels]
  const float* const* sources;  // [taps]: the input of the first output
  int taps, channels, padded_channels;
  int64_t step;  // elements between the inputs of neighbouring outputs
  float row_scale;
};

// Adds, clamps, stores and rounds results.
struct FinishTask {
  const float* from;  // [rows][from_stride]
  int64_t from_stride;
  bool from_padded;     // zeros follow the channels up to a multiple of 16
  const float* addend;  // [rows][stride], or null
  float* y;             // [rows][stride], or null
  int64_t stride;
  float low, high;
  const Rounding* rounding;
  InputKind kind;
  uint8_t* const* images;  // [rows]: where the significands go; or null
  int channels, padded;    // zeros follow the significands up to `padded`
};

}  // namespace dybit
