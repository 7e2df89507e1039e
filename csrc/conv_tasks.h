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

// How sums of one channel per group become significands of 8 bits, r = 1.
struct DepthwiseRounding {
  // [channels, at least 16]: sum · factor + term is a result in steps of 2^-kStepBits of a significand, plus half a
  // significand, plus half of the span that `near` leaves out.
  const float *factors, *terms;
  int32_t near;  // bits of a fraction: if they are all zero, the result may be a tie
  // Exactly: results are clamped to low and high, divided by the scale, clamped to least and most, and rounded.
  float low, high, offset, scale, unit, least, most;
  InputKind kind;
  int first, last;  // significands: what low and high are rounded to
};
constexpr int kStepBits = 14;

// Lines of outputs of a convolution with one channel per group. Sums of products are integers below 2^24. Arrays of
// channels have at least 16.
struct DepthwiseTask {
  InputKind kind;
  const uint8_t* image;            // the first input of the first output
  const int64_t* rows;             // [row_count]: bytes from there to the rows of the kernel, in depth and height
  int row_count, width;            // of the kernel
  int64_t tap, step, line;         // bytes between the inputs of neighbouring taps, outputs and lines
  const int8_t* bytes;             // [row_count][width][padded]: the weights, or null if they do not fit
  const int16_t* weights;          // the same
  const float *scales, *bias;      // [padded]
  float row_scale;
  int channels, padded, lines, places;
  float* y;                           // [lines][places][channels], or null
  const DepthwiseRounding* rounding;  // if y is null
  uint8_t* out;                       // the first significand
  int64_t out_place, out_line;        // bytes; zeros follow the channels of a place
};

// Kinds of blocks of channels that a convolution is divided into, the widest first.
template <class... kKinds>
struct DepthwiseBlocks {};

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
