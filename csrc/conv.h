// Convolutions of codes. Inputs are rounded once to an image and multiplied by the weights. Results are FP32, or an
// image for the next convolution. With PanelKernels (conv_panels.cc), inputs are read where they lie and results are
// finished in registers. Without them, or with few rows, inputs are gathered into rows, and packed weights are
// unpacked for each tile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "conv_tasks.h"
#include "image.h"
#include "packed_weight.h"
#include "panels.h"

namespace dybit {

struct ConvGeometry {
  Extent kernel, stride, dilation, before, after;  // before, after: zeros around the input
  int channels, groups;
  // The order of the weights' columns: channel first, or kernel position first.
  bool channel_major;

  Extent padded(const Extent& size) const { return padded_by(before, size, after); }
  Extent output(const Extent& size) const;
};

struct ConvInput {
  const float* x;  // [batch][size][channels], or planar: [batch][channels][size]
  int batch;
  Extent size;
  const float* scale;   // or null: dynamic, one for each sample
  const float* offset;  // or null; only without zeros around the input
  float reach;
  bool planar;  // x and the results

  // The scale of each sample, as torch.ops.dybit.fake_quantize_dynamic computes it; NaN if x is not finite.
  std::vector<float> scales(int channels, const InputFormat& format) const;

  // Calls run(samples, y) for some samples at a time, whose images of so many bytes stay in the caches, until one call
  // returns false. Elements are those of a sample.
  template <class F>
  bool by_samples(int64_t image_bytes, int64_t x_elements, float* y, int64_t y_elements, int threads, F&& run) const {
    constexpr int64_t kCacheBytes = int64_t(1) << 19;  // of a thread
    const int step = int(std::clamp<int64_t>(kCacheBytes * threads / std::max<int64_t>(image_bytes, 1), 1, batch));
    for (int first = 0; first < batch; first += step) {
      ConvInput some = *this;
      some.batch = std::min(step, batch - first);
      some.x += first * x_elements;
      if (!run(some, y + first * y_elements)) return false;
    }
    return true;
  }
};

class Conv {
 public:
  // One weight for each group. The weights must outlive this object.
  Conv(std::vector<const PackedWeight*> weights, const ConvGeometry& geometry);

  // y: [batch][output][rows of the weights], or planar as the input. Returns false and leaves y unfinished if x holds NaN, or infinity at a
  // dynamic scale, or if groups differ in the kind of input or in layout.
  bool run(const ConvInput& input, float* y, const float* bias, int threads) const;

  // Convolves an image at one scale. Its border must be at least as wide as the geometry's. Also returns false if a
  // result that is to be rounded is NaN.
  bool run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
           const Finish& finish, int threads) const;

 private:
  struct Run {
    int batch;
    Extent size;
    const float* scales;  // of each sample
    const float* offset;  // or null
    const float* bias;    // or null
    int threads;
  };
  // The weights of all groups in words, for images of a pitch.
  struct Unpacked {
    int pitch;
    std::vector<Word> words;
    std::vector<PanelWeight> groups;
  };
  class Multiplication;
  class PanelProduct;
  static constexpr int64_t kLittleWork = 200000;  // products that do not pay for a second thread

  bool run_some(const ConvInput& input, float* y, const float* bias, int threads) const;
  bool multiply(const Run& run, const Image& image, const Finish& finish) const;
  std::vector<float> biases(const float* bias, const float* offset) const;
  Image image() const;  // of FP32 inputs, without memory
  std::vector<GatherRun> runs(const PackedWeight& weight, int group, const Extent& padded, const Image& image) const;
  bool whole_rows() const;
  std::vector<Word> words(int pitch) const;
  const Unpacked* unpacked(int pitch) const;
  // Returns false and does nothing if the kernels or the inputs do not allow it. *known: whether no result that is
  // rounded is NaN.
  bool run_panels(const Run& run, const Image& image, const Finish& finish, bool* known) const;

  std::vector<const PackedWeight*> weights_;
  ConvGeometry geometry_;
  bool alike_ = true;
  mutable std::unique_ptr<std::mutex> mutex_ = std::make_unique<std::mutex>();  // of what follows
  mutable std::vector<std::unique_ptr<Unpacked>> unpacked_;
};

}  // namespace dybit
