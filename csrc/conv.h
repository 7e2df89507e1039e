// Convolutions over codes: inputs are rounded once, gathered into rows of a product (or summed directly, channel by
// channel, where every channel is convolved alone), and multiplied by packed weights. Must not know Python or torch.
//
// Tensors are channels-last: [batch][depth][height][width][channels]; convolutions of fewer dimensions have leading ones.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "packed.h"
#include "weight.h"

namespace dybit {

using Extent = std::array<int, 3>;

struct ConvGeometry {
  Extent kernel, stride, dilation, before, after;  // zeros before and after each dimension
  int channels, groups;
  // Columns of the weights: by kernel position and then by channel, or by channel first.
  bool channel_major;

  Extent padded(const Extent& size) const;
  Extent output(const Extent& size) const;
};

struct ConvInput {
  const float* x;
  int batch;
  Extent size;
  const float* scale;   // null: dynamic, one for every sample
  const float* offset;  // or null; only without zeros at the borders
  float reach;
};

// A run of the bytes of a gathered row.
struct GatherRun {
  int to;
  int64_t from;
  int bytes;
};

struct GatherTask {
  const uint8_t* image;
  const GatherRun* runs;
  int run_count;
  const Segment* segments;
  int segment_count;
  int element_bytes;
  size_t row_bytes;
};

// One row of outputs, channels being alone; sums of products of significands in FP32, exact below 2^24.
struct DepthwiseTask {
  const float* weights;  // [taps][padded_channels]
  const float* scales;   // [padded_channels]
  const float* bias;     // [padded_channels]
  const float* const* sources;  // of every tap, where the first output's input lies
  int taps, channels, padded_channels;
  int64_t step;  // elements between the inputs of neighbouring outputs
  float row_scale;
};

class Conv {
 public:
  // One weight for every group; they must outlive this.
  Conv(std::vector<const PackedWeight*> weights, const ConvGeometry& geometry);

  // y [batch][output][weights' rows]. False if x holds NaN, which has no significand, or groups
  // differ in the kind of input or in layout; y is then unfinished.
  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;

 private:
  std::vector<GatherRun> runs(const PackedWeight& weight, int group, const Extent& padded, int element_bytes) const;

  std::vector<const PackedWeight*> weights_;
  ConvGeometry geometry_;
  bool alike_ = true;
};

class Depthwise {
 public:
  // significands: [kernel positions][channels], of products whose sums stay below 2^24; scales: [channels].
  Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry, const InputFormat& input);

  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;

 private:
  bool run_rows(const ConvInput& input, int sample, float scale, int first, int last, const float* bias, float* y) const;

  ConvGeometry geometry_;
  InputFormat input_;
  int padded_channels_;
  std::vector<float> weights_, scales_, sums_;
};

}  // namespace dybit
