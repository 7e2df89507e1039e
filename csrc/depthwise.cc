#include "depthwise.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "codes.h"
#include "conv_tasks.h"
#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 50000;  // elements that do not pay for a second thread
constexpr int kLeastLines = 4;      // of outputs for a thread

}  // namespace

Depthwise::Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry,
                     const InputFormat& input)
    : geometry_(geometry), input_(input), padded_channels_((geometry.channels + kLanes - 1) / kLanes * kLanes) {
  if (geometry.groups != geometry.channels)
    throw std::invalid_argument("the convolution does not have one channel per group");
  const int taps = int(volume(geometry.kernel));
  weights_.assign(size_t(taps) * padded_channels_, 0.0f);
  scales_.assign(padded_channels_, 0.0f);
  sums_.assign(padded_channels_, 0.0f);
  for (int channel = 0; channel < geometry.channels; ++channel) {
    scales_[channel] = scales[channel];
    float sum = 0;
    for (int tap = 0; tap < taps; ++tap) {
      const float w = significands[tap * geometry.channels + channel];
      weights_[size_t(tap) * padded_channels_ + channel] = w;
      sum += w;
    }
    sums_[channel] = sum * scales[channel];
  }
}

// [padded channels], including the contribution of an offset of the inputs.
std::vector<float> Depthwise::biases(const float* bias, const float* offset) const {
  std::vector<float> result(padded_channels_, 0.0f);
  for (int channel = 0; channel < geometry_.channels; ++channel) {
    result[channel] = bias ? bias[channel] : 0.0f;
    if (offset) result[channel] = std::fma(*offset, sums_[channel], result[channel]);
  }
  return result;
}

// The inputs: FP32, rounded line by line, or an image.
struct Depthwise::Source {
  const float* x;      // or null
  const Image* image;  // or null
  int batch;
  Extent size;
  const float* scales;  // of each sample
  const float* offset;  // of x, or null
};

// Computes lines of one plane of the outputs of a sample. Lines of input become FP32 when the first line of outputs
// needs them. As many lines are kept as one line of outputs reads: a ring for each plane of the kernel.
class Depthwise::Band {
 public:
  Band(const Depthwise& conv, const Source& source, int sample, int plane)
      : g_(conv.geometry_), codes_(*kernels().codes), source_(source), image_(source.image), sample_(sample),
        plane_(plane), padded_(g_.padded(source.size)),
        rounding_(conv.input_.rounding(source.scales[sample], source.offset)),
        stride_(image_ && image_->pitch >= conv.padded_channels_ ? image_->pitch : conv.padded_channels_),
        lines_((g_.kernel[1] - 1) * g_.dilation[1] + 1), line_(size_t(padded_[2]) * stride_) {
    static thread_local Scratch ring_memory;
    const size_t count = line_ * lines_ * g_.kernel[0];
    ring_ = ring_memory.take<float>(count);
    // Borders, and channels that pad a place, are not written below and stay zero.
    if (!image_ || image_->pitch != stride_) std::memset(ring_, 0, count * sizeof(float));
  }

  // Whether no value is NaN.
  bool run(const Depthwise& conv, int first, int last, const float* bias, const Finish& finish) {
    static thread_local Scratch result_memory;
    const Extent places = g_.output(source_.size);
    std::vector<const float*> taps(volume(g_.kernel));
    const DepthwiseTask task{conv.weights_.data(),
                             conv.scales_.data(),
                             bias,
                             taps.data(),
                             int(taps.size()),
                             g_.channels,
                             conv.padded_channels_,
                             g_.stride[2] * stride_,
                             source_.scales[sample_] / conv.input_.unit()};
    const bool plain = finish.is_plain();
    float* results = plain ? nullptr : result_memory.take<float>(size_t(places[2]) * g_.channels);
    for (int row = first, next = first * g_.stride[1]; row < last; ++row) {
      const int top = row * g_.stride[1];
      for (next = std::max(next, top); next < top + lines_; ++next) read(next);
      for (size_t tap = 0; tap < taps.size(); ++tap) {
        const Extent k = place_at(int64_t(tap), g_.kernel);
        taps[tap] = slot(k[0], top + k[1] * g_.dilation[1]) + k[2] * g_.dilation[2] * stride_;
      }
      const int64_t start = index_of({plane_, row, 0}, sample_, places);
      codes_.depthwise(task, places[2], plain ? finish.y + start * g_.channels : results);
      if (plain) continue;
      const Results given{results, g_.channels, false, start, places[2], 0, g_.channels};
      unknown_ |= finish_some(codes_, finish, places, g_.channels, given);
    }
    return !unknown_;
  }

 private:
  float* slot(int k, int h) const { return ring_ + (size_t(k) * lines_ + h % lines_) * line_; }

  // Line h of the padded input, in every plane that the kernel reads.
  void read(int h) {
    for (int k = 0; k < g_.kernel[0]; ++k) {
      const int d = plane_ * g_.stride[0] + k * g_.dilation[0];
      image_ ? convert(d, h, slot(k, h)) : round(d, h, slot(k, h));
    }
  }

  // A line of the image, border and all.
  void convert(int d, int h, float* to) const {
    const Extent whole = image_->padded(source_.size), corner = minus(image_->before, g_.before);
    const uint8_t* from =
        image_->data + index_of({corner[0] + d, corner[1] + h, corner[2]}, sample_, whole) * image_->pixel();
    if (image_->pitch == stride_) {
      codes_.convert(image_->kind, from, int64_t(line_), InputKind::kFloat, to);
    } else {
      for (int w = 0; w < padded_[2]; ++w)
        codes_.convert(image_->kind, from + w * image_->pixel(), g_.channels, InputKind::kFloat, to + w * stride_);
    }
  }

  // A line of FP32 inputs.
  void round(int d, int h, float* to) {
    const Extent& size = source_.size;
    d -= g_.before[0], h -= g_.before[1];
    if (d < 0 || d >= size[0] || h < 0 || h >= size[1]) {
      std::memset(to, 0, line_ * sizeof(float));
      return;
    }
    to += g_.before[2] * stride_;
    const float* from = source_.x + index_of({d, h, 0}, sample_, size) * g_.channels;
    if (stride_ == g_.channels) {
      unknown_ |= codes_.significands(rounding_, InputKind::kFloat, from, size[2] * stride_, to);
    } else {
      for (int w = 0; w < size[2]; ++w, from += g_.channels)
        unknown_ |= codes_.significands(rounding_, InputKind::kFloat, from, g_.channels, to + w * stride_);
    }
  }

  const ConvGeometry& g_;
  const CodeKernels& codes_;
  const Source& source_;
  const Image* image_;
  const int sample_, plane_;
  const Extent padded_;
  const Rounding rounding_;
  const int64_t stride_;  // floats of a place
  const int lines_;       // of a ring
  const size_t line_;     // floats of a line
  float* ring_;
  bool unknown_ = false;
};

bool Depthwise::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  const std::vector<float> scales = input.scales(geometry_.channels, input_);
  return run_bands({input.x, nullptr, input.batch, input.size, scales.data(), input.offset},
                   biases(bias, input.offset), Finish::plain(y), threads);
}

bool Depthwise::run(const Image& image, int batch, const Extent& size, float scale, const float* offset,
                    const float* bias, const Finish& finish, int threads) const {
  if (finish.image) clear_border(*finish.image, batch, geometry_.output(size));
  const std::vector<float> scales(batch, scale);
  return run_bands({nullptr, &image, batch, size, scales.data(), nullptr}, biases(bias, offset), finish, threads);
}

bool Depthwise::run_bands(const Source& source, const std::vector<float>& bias, const Finish& finish,
                          int threads) const {
  const Extent places = geometry_.output(source.size);
  const int64_t elements = volume(source.size) * geometry_.channels * source.batch;
  const int planes = places[0], lines = places[1];
  const bool divide = threads > 1 && elements > kLittle;
  const int bands = divide ? std::clamp(lines / kLeastLines, 1, 2 * threads) : 1;
  std::atomic<bool> unknown{false};
  parallel_for(source.batch * planes * bands, divide ? threads : 1, [&](int i) {
    const int band = i % bands, plane = i / bands % planes, sample = i / bands / planes;
    const int first = int(int64_t(lines) * band / bands), last = int(int64_t(lines) * (band + 1) / bands);
    if (!Band(*this, source, sample, plane).run(*this, first, last, bias.data(), finish)) unknown = true;
  });
  return !unknown;
}

}  // namespace dybit
