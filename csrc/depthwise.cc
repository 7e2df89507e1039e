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
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 50000;       // elements that do not pay for a second thread
constexpr int64_t kCallBytes = 1 << 16;  // of inputs of a call: they stay in the L2 cache

// The kind of inputs that holds the significands of a format.
InputKind kind_of(const InputFormat& format) {
  const float largest = format.top() * format.unit();
  if (largest <= 127 && format.is_signed) return InputKind::kSigned8;
  return largest <= 255 && !format.is_signed ? InputKind::kUnsigned8 : InputKind::kSigned16;
}

// The same image with at least 16 channels in each place, so that whole blocks can be read.
Image widened(const Image& image, int64_t places) {
  static thread_local Scratch wide_memory;
  Image wide = image;
  wide.pitch = kLanes;
  wide.data = wide_memory.take<uint8_t>(places * wide.pixel());
  for (int64_t i = 0; i < places; ++i)
    std::memcpy(wide.data + i * wide.pixel(), image.data + i * image.pixel(), size_t(image.pixel()));
  return wide;
}

}  // namespace

Depthwise::Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry,
                     const InputFormat& input)
    : geometry_(geometry), input_(input), padded_channels_(std::max(geometry.channels, kLanes)) {
  if (geometry.groups != geometry.channels)
    throw std::invalid_argument("the convolution does not have one channel per group");
  const int taps = int(volume(geometry.kernel));
  weights_.assign(size_t(taps) * padded_channels_, 0);
  scales_.assign(padded_channels_, 0.0f);
  sums_.assign(padded_channels_, 0.0f);
  most_.assign(padded_channels_, 0.0);
  bool narrow = true;
  for (int channel = 0; channel < geometry.channels; ++channel) {
    scales_[channel] = scales[channel];
    float sum = 0;
    for (int tap = 0; tap < taps; ++tap) {
      const float w = significands[tap * geometry.channels + channel];
      if (!(std::fabs(w) <= 32767)) throw std::invalid_argument("a significand of the weight does not fit 16 bits");
      weights_[size_t(tap) * padded_channels_ + channel] = int16_t(w);
      narrow &= std::fabs(w) <= 127;
      sum += w;
      most_[channel] += std::fabs(w) * input.top() * input.unit();
    }
    sums_[channel] = sum * scales[channel];
  }
  if (narrow) bytes_.assign(weights_.begin(), weights_.end());
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

// From sums to significands by one fused multiply-add (DepthwiseRounding).
//
// With u = 2^-24, the exact result in significands, which is rounded five times, and this one differ by at most
// u (2 |product| + |bias| + |product + bias| + 3 |result| + 1), in significands, and less than one step. Where the result
// is in range, its magnitude is at most 2^m, and those of product and offset follow from the bias. Results out of range
// saturate either way.
struct Depthwise::Steps {
  bool usable;
  std::vector<float> factors, terms;
  DepthwiseRounding rounding;

  Steps(const Depthwise& conv, const Finish& finish, const std::vector<float>& bias, float row_scale)
      : usable(false), rounding{} {
    const Rounding& r = finish.rounding;
    if (!finish.image || finish.y || finish.addend || finish.activation || finish.image->kind == InputKind::kSigned16 || r.max_run != 1 ||
        !ordinary(r.scale) || !ordinary(row_scale) || std::isnan(finish.low) || std::isnan(finish.high))
      return;
    const double unit = std::ldexp(1.0, r.magnitude_bits - 1), per = unit / r.scale, range = 2 * unit;
    const double offset = std::fabs(r.offset) * per;
    double reach = 0;
    factors.assign(conv.padded_channels_, 0.0f);
    terms.assign(conv.padded_channels_, 0.0f);
    for (int channel = 0; channel < conv.geometry_.channels; ++channel) {
      const double scale = conv.scales_[channel], factor = scale * row_scale * per;
      const double term = (double(bias[channel]) - r.offset) * per;
      if (scale != 0 && !ordinary(std::fabs(scale))) return;
      if (!(std::fabs(factor) * conv.most_[channel] + std::fabs(term) + offset < 65536)) return;
      reach = std::max(reach, 6 * range + 3 * std::fabs(term) + offset + 4);
      factors[channel] = float(std::ldexp(factor, kStepBits));
      terms[channel] = float(std::ldexp(term + 0.5, kStepBits));
    }
    int margin = 1;
    while (margin < std::ldexp(1.01 * reach, kStepBits - 24) + 1.5) margin *= 2;
    if (16 * margin > 1 << kStepBits) return;
    for (float& term : terms) term += float(margin);
    const float largest = float(2 * unit - 1);
    auto rounded = [&](float limit) {
      const float t = (limit - r.offset) / r.scale * float(unit);
      return int(std::nearbyint(std::clamp(t, r.is_signed ? -largest : 0.0f, largest)));
    };
    const int32_t near = ((1 << kStepBits) - 1) & ~(2 * margin - 1);
    rounding = {factors.data(), terms.data(),         near,          finish.low,           finish.high,
                r.offset,       r.scale,              float(unit),   r.is_signed ? -largest : 0.0f,
                largest,        finish.image->kind, rounded(finish.low), rounded(finish.high)};
    usable = true;
  }

  // Products of such numbers are neither subnormal nor infinite.
  static bool ordinary(float x) { return x >= 0x1p-60f && x <= 0x1p60f; }
};

// Computes lines of outputs of an image.
class Depthwise::Lines {
 public:
  Lines(const Depthwise& conv, const Image& image, const Extent& size, const std::vector<float>& bias,
        const Finish& finish, const Steps& steps)
      : g_(conv.geometry_), codes_(*kernels().codes), image_(image), finish_(finish), steps_(steps),
        padded_(image.padded(size)), places_(g_.output(size)), corner_(minus(image.before, g_.before)) {
    for (int d = 0; d < g_.kernel[0]; ++d)
      for (int h = 0; h < g_.kernel[1]; ++h)
        rows_.push_back(index_of({d * g_.dilation[0], h * g_.dilation[1], 0}, 0, padded_) * image.pixel());
    task_ = {};
    task_.kind = image.kind;
    task_.rows = rows_.data();
    task_.row_count = int(rows_.size());
    task_.width = g_.kernel[2];
    task_.tap = g_.dilation[2] * image.pixel();
    task_.step = g_.stride[2] * image.pixel();
    task_.line = int64_t(g_.stride[1]) * padded_[2] * image.pixel();
    task_.bytes = conv.bytes_.empty() ? nullptr : conv.bytes_.data();
    task_.weights = conv.weights_.data();
    task_.scales = conv.scales_.data();
    task_.bias = bias.data();
    task_.channels = g_.channels;
    task_.padded = conv.padded_channels_;
    task_.places = places_[2];
  }

  // Lines of outputs whose inputs make up a call.
  int step() const { return int(std::clamp<int64_t>(kCallBytes / task_.line, 1, places_[1])); }

  // Returns whether a result that is rounded is NaN.
  bool run(int sample, int plane, int first, int last, float row_scale) const {
    static thread_local Scratch result_memory;
    DepthwiseTask task = task_;
    const int start[3] = {plane, first, 0};
    Extent from;
    for (int d = 0; d < 3; ++d) from[d] = corner_[d] + start[d] * g_.stride[d];
    task.image = image_.data + index_of(from, sample, padded_) * image_.pixel();
    task.lines = last - first;
    task.row_scale = row_scale;
    const int64_t place = index_of({plane, first, 0}, sample, places_);
    if (steps_.usable) {
      const Image& out = *finish_.image;
      const Extent inner{plane + out.before[0], first + out.before[1], out.before[2]}, whole = out.padded(places_);
      task.rounding = &steps_.rounding;
      task.out_place = out.pixel();
      task.out_line = whole[2] * out.pixel();
      task.out = out.data + index_of(inner, sample, whole) * out.pixel();
      codes_.depthwise(task);
      return false;
    }
    const int count = task.lines * task.places;
    const bool in_place = finish_.is_plain() && !finish_.planar;
    task.y = in_place ? finish_.y + place * g_.channels : result_memory.take<float>(count * g_.channels);
    codes_.depthwise(task);
    if (in_place) return false;
    if (finish_.activation) kernels().rows->unary(*finish_.activation, task.y, int64_t(count) * g_.channels, task.y);
    const Results results{task.y, g_.channels, false, place, count, 0, g_.channels};
    if (!finish_.planar) return finish_some(codes_, finish_, places_, g_.channels, results);
    store_planar(results, places_, g_.channels, finish_.y);
    return false;
  }

 private:
  const ConvGeometry& g_;
  const CodeKernels& codes_;
  const Image& image_;
  const Finish& finish_;
  const Steps& steps_;
  const Extent padded_, places_, corner_;
  std::vector<int64_t> rows_;
  DepthwiseTask task_;
};

Image Depthwise::image() const {
  const int channels = geometry_.channels;
  return {nullptr, kind_of(input_), geometry_.before, geometry_.after, channels, std::max(channels, kLanes)};
}

bool Depthwise::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  const Image made = image();
  const int64_t channels = geometry_.channels;
  return input.by_samples(volume(made.padded(input.size)) * made.pixel(), volume(input.size) * channels, y,
                          volume(geometry_.output(input.size)) * channels, threads,
                          [&](const ConvInput& some, float* to) { return run_some(some, to, bias, threads); });
}

bool Depthwise::run_some(const ConvInput& input, float* y, const float* bias, int threads) const {
  static thread_local Scratch image_memory;
  Image image = this->image();
  image.data = image_memory.take<uint8_t>(size_t(volume(image.padded(input.size))) * image.pixel() * input.batch);
  const std::vector<float> scales = input.scales(geometry_.channels, input_);
  std::vector<Rounding> roundings;
  for (float scale : scales) roundings.push_back(input_.rounding(scale, input.offset));
  if (!round_to_image(input.x, input.batch, input.size, roundings.data(), true, image, threads, input.planar))
    return false;
  return run_lines(image, input.batch, input.size, scales.data(), biases(bias, input.offset),
                   Finish::plain(y, input.planar), threads);
}

bool Depthwise::run(const Image& image, int batch, const Extent& size, float scale, const float* offset,
                    const float* bias, const Finish& finish, int threads) const {
  if (finish.image) fill_border(*finish.image, batch, geometry_.output(size), finish.rounding);
  const std::vector<float> scales(batch, scale);
  return run_lines(image.pitch < kLanes ? widened(image, batch * volume(image.padded(size))) : image, batch, size,
                   scales.data(), biases(bias, offset), finish, threads);
}

bool Depthwise::run_lines(const Image& image, int batch, const Extent& size, const float* scales,
                          const std::vector<float>& bias, const Finish& finish, int threads) const {
  const Extent places = geometry_.output(size);
  if (batch == 0 || volume(places) == 0) return true;
  const float unit = input_.unit();
  const Steps steps(*this, finish, bias, scales[0] / unit);  // images have one scale
  const Lines all(*this, image, size, bias, finish, steps);
  const bool divide = threads > 1 && volume(size) * geometry_.channels * batch > kLittle;
  const int planes = places[0], lines = places[1];
  int bands = (lines + all.step() - 1) / all.step();
  if (divide) bands = std::clamp((2 * threads + batch * planes - 1) / (batch * planes), bands, lines);
  std::atomic<bool> unknown{false};
  parallel_for(batch * planes * bands, divide ? threads : 1, [&](int i) {
    const int band = i % bands, plane = i / bands % planes, sample = i / bands / planes;
    const int first = int(int64_t(lines) * band / bands), last = int(int64_t(lines) * (band + 1) / bands);
    if (all.run(sample, plane, first, last, scales[sample] / unit)) unknown = true;
  });
  return !unknown;
}

}  // namespace dybit
