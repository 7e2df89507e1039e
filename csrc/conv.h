// Convolutions over codes: inputs are rounded once, gathered into rows of a product (or summed directly, channel by
// channel, where every channel is convolved alone), and multiplied by packed weights. Results are FP32, or rounded at
// once to the significands that the next convolution takes. Must not know Python or torch.
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

// Significands with a border of zeros: [batch][before + size + after, in three dimensions][pitch], where each place has
// `channels` significands and then zeros.
struct Image {
  uint8_t* data;
  InputKind kind;
  Extent before, after;
  int channels, pitch;

  int element() const { return kind == InputKind::kFloat ? 4 : kind == InputKind::kSigned16 ? 2 : 1; }
  Extent padded(const Extent& size) const;
};

// What is made of the results of a convolution: the sum with the addend, clamped, as FP32 and as an image.
struct Finish {
  float* y;             // [batch][places][channels], or null
  const float* addend;  // likewise
  float low, high;
  const Image* image;  // or null
  Rounding rounding;   // of the image; static

  bool plain() const;
};

struct FinishTask {
  const float* from;  // [rows][from_stride]
  int64_t from_stride;
  bool from_padded;     // whether zeros follow the channels up to a multiple of 16
  const float* addend;  // [rows][stride], or null
  float* y;             // likewise
  int64_t stride;
  float low, high;
  const Rounding* rounding;
  InputKind kind;
  uint8_t* const* images;  // where every row's significands go, or null
  int channels, padded;    // significands are followed by zeros up to `padded`
};

// A run of the bytes of a gathered row.
struct GatherRun {
  int to;
  int64_t from;
  int bytes;
};

// Where rows lie in the image as they should, they are not gathered, but only summed.
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

  // The same of an image at one scale, with a border at least as wide as the geometry's; false, too, if a result that
  // is to be rounded is NaN.
  bool run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
           const Finish& finish, int threads) const;

 private:
  struct Run;
  bool multiply(const Run& run, const Image& image, const float* bias, const Finish& finish) const;
  std::vector<GatherRun> runs(const PackedWeight& weight, int group, const Extent& padded, const Image& image) const;
  bool whole_rows() const;

  std::vector<const PackedWeight*> weights_;
  ConvGeometry geometry_;
  bool alike_ = true;
};

class Depthwise {
 public:
  // significands: [kernel positions][channels], of products whose sums stay below 2^24; scales: [channels].
  Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry, const InputFormat& input);

  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;

  bool run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
           const Finish& finish, int threads) const;

 private:
  struct Source;
  struct Band;
  bool run_bands(const Source& source, const std::vector<float>& bias, const Finish& finish, int threads) const;
  bool run_band(const Source& source, const Band& band, const float* bias, const Finish& finish) const;
  std::vector<float> biases(const float* bias, const float* offset) const;

  ConvGeometry geometry_;
  InputFormat input_;
  int padded_channels_;
  std::vector<float> weights_, scales_, sums_;
};

// Rounds x, FP32 [batch][size][channels], to an image. False if there is NaN.
bool round_to_image(const float* x, int batch, const Extent& size, const Rounding* rounding, bool by_sample,
                    const Image& image, int threads);

}  // namespace dybit
