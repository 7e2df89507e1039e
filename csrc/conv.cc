#include "conv.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "codes.h"
#include "dispatch.h"
#include "pool.h"

namespace dybit {
namespace {

constexpr size_t kTileBytes = size_t(1) << 18;  // of gathered rows, to stay in the L2 cache
constexpr int kLeastTile = 96;                  // rows: fewer would not pay for unpacking the weights

int64_t volume(const Extent& extent) { return int64_t(extent[0]) * extent[1] * extent[2]; }

bool has_border(const ConvGeometry& g) {
  for (int d = 0; d < 3; ++d)
    if (g.before[d] || g.after[d]) return true;
  return false;
}

Rounding rounding_of(const InputFormat& format, float scale, const float* offset) {
  return {format.magnitude_bits, format.max_run, format.is_signed, false, 1.0f, scale, offset ? *offset : 0.0f};
}

// The scale of a sample as torch.ops.dybit.fake_quantize_dynamic has it.
float sample_scale(const ConvInput& input, const CodeKernels& k, const float* x, int64_t count) {
  if (input.scale) return *input.scale;
  const float scale = std::bit_cast<float>(k.largest(x, count)) / input.reach;
  return scale <= std::numeric_limits<float>::max() ? std::max(scale, std::numeric_limits<float>::min()) : 1.0f;
}

// Memory that a thread keeps between calls: the first touch of fresh memory costs more than the work.
template <int kUse>
uint8_t* scratch(size_t bytes) {
  static thread_local std::vector<uint8_t> memory;
  if (memory.size() < bytes + 128) memory.resize(bytes + 128);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

float unit_of(const InputFormat& format) { return std::ldexp(1.0f, format.magnitude_bits - 1); }

}  // namespace

Extent ConvGeometry::padded(const Extent& size) const {
  Extent result;
  for (int d = 0; d < 3; ++d) result[d] = before[d] + size[d] + after[d];
  return result;
}

Extent ConvGeometry::output(const Extent& size) const {
  Extent result;
  for (int d = 0; d < 3; ++d) result[d] = (padded(size)[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  return result;
}

Conv::Conv(std::vector<const PackedWeight*> weights, const ConvGeometry& geometry)
    : weights_(std::move(weights)), geometry_(geometry) {
  const int64_t columns = volume(geometry.kernel) * (geometry.channels / geometry.groups);
  for (const PackedWeight* weight : weights_)
    if (weight->weight().columns != columns || weight->weight().rows != weights_[0]->weight().rows ||
        int(weights_.size()) != geometry.groups || weight->kind() == InputKind::kFloat)
      throw std::invalid_argument("the weights do not fit the convolution");
  // Variants chosen by channel may need wider significands in one group than in another.
  const Weight& first = weights_[0]->weight();
  for (const PackedWeight* weight : weights_)
    alike_ &= weight->kind() == weights_[0]->kind() && weight->weight().segment_count == first.segment_count &&
              weight->weight().chunk_count == first.chunk_count;
}

std::vector<GatherRun> Conv::runs(const PackedWeight& weight, int group, const Extent& padded, int element_bytes) const {
  const ConvGeometry& g = geometry_;
  const int per_group = g.channels / g.groups, taps = int(volume(g.kernel));
  const Weight& w = weight.weight();
  std::vector<GatherRun> result;
  const Segment* segment = w.segments;
  auto source = [&](int tap, int channel) {
    const int k2 = tap % g.kernel[2], k1 = tap / g.kernel[2] % g.kernel[1], k0 = tap / g.kernel[2] / g.kernel[1];
    const int64_t pixel = (int64_t(k0) * g.dilation[0] * padded[1] + k1 * g.dilation[1]) * padded[2] + k2 * g.dilation[2];
    return (pixel * g.channels + group * per_group + channel) * element_bytes;
  };
  for (int column = 0; column < w.columns; ++column) {
    if (column == segment->start + segment->length) ++segment;
    const int to = (segment->chunk * kChunk + column - segment->start) * element_bytes;
    const int64_t from = g.channel_major ? source(column % taps, column / taps) : source(column / per_group, column % per_group);
    if (!result.empty() && result.back().to + result.back().bytes == to && result.back().from + result.back().bytes == from)
      result.back().bytes += element_bytes;
    else
      result.push_back({to, from, element_bytes});
  }
  return result;
}

bool Conv::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  if (!alike_) return false;
  const ConvGeometry& g = geometry_;
  const Kernels& kernels = weights_[0]->kernels();
  const CodeKernels& codes = *kernels.codes;
  const InputKind kind = weights_[0]->kind();
  const InputFormat& format = weights_[0]->input();
  const int size = kind == InputKind::kSigned16 ? 2 : 1;
  const Extent padded = g.padded(input.size), places = g.output(input.size);
  const int64_t pixel = int64_t(g.channels) * size, image = volume(padded) * pixel;
  const int64_t elements = volume(input.size) * g.channels, per_sample = volume(places);

  uint8_t* images = scratch<0>(size_t(image) * input.batch);
  std::vector<float> sample_scales(input.batch);
  std::atomic<bool> unknown{false};
  if (has_border(g)) std::memset(images, 0, size_t(image) * input.batch);
  const int lines = input.size[0] * input.size[1];
  const int64_t line = int64_t(input.size[2]) * g.channels;
  for (int sample = 0; sample < input.batch; ++sample)
    sample_scales[sample] = sample_scale(input, codes, input.x + sample * elements, elements);
  // Lines without borders follow each other, so several are one run.
  const bool plain = !has_border(g);
  const int step = int(std::clamp<int64_t>((int64_t(1) << 14) / std::max<int64_t>(1, line), 1, lines));
  const int steps = (lines + step - 1) / step;
  parallel_for(input.batch * steps, elements * input.batch < 50000 ? 1 : threads, [&](int i) {
    const int sample = i / steps, first = i % steps * step, last = std::min(lines, first + step);
    const Rounding rounding = rounding_of(format, sample_scales[sample], input.offset);
    for (int at = first; at < last; at += plain ? last - first : 1) {
      const int d = at / input.size[1] + g.before[0], h = at % input.size[1] + g.before[1];
      uint8_t* to = images + sample * image + ((int64_t(d) * padded[1] + h) * padded[2] + g.before[2]) * pixel;
      const int64_t count = plain ? line * (last - first) : line;
      if (codes.significands(rounding, kind, input.x + sample * elements + at * line, count, to)) unknown = true;
    }
  });
  if (unknown) return false;

  const int rows = weights_[0]->weight().rows, outputs = rows * g.groups, blocks = weights_[0]->weight().blocks;
  std::vector<float> biases(size_t(g.groups) * blocks * kBlockRows, 0.0f);
  for (int group = 0; group < g.groups; ++group)
    for (int n = 0; n < rows; ++n) {
      float& b = biases[size_t(group) * blocks * kBlockRows + n];
      b = bias ? bias[group * rows + n] : 0.0f;
      if (input.offset) b = std::fma(*input.offset, weights_[group]->row_sums()[n], b);
    }

  const Weight& first_weight = weights_[0]->weight();
  const size_t row_bytes = size_t(first_weight.chunk_count) * kChunk * size;
  const int segments = first_weight.segment_count;
  const bool identity = volume(g.kernel) == 1 && g.stride == Extent{1, 1, 1} && plain && g.groups == 1 &&
                        row_bytes == size_t(pixel) && segments == 1;
  std::vector<std::vector<GatherRun>> gathers(g.groups);
  for (int group = 0; group < g.groups; ++group) gathers[group] = runs(*weights_[group], group, padded, size);

  const int64_t total = per_sample * input.batch;
  const int64_t tile = std::clamp<int64_t>(int64_t(kTileBytes / row_bytes) / 6 * 6, kLeastTile, 1536);
  const int64_t tiles = (total + tile - 1) / tile;
  // Where there are fewer tiles than threads, the rows of the weights are divided, too.
  const int unit = kernels.unit_blocks, units = (blocks + unit - 1) / unit;
  const int parts = tiles >= 2 * threads ? 1 : std::min<int>(units, int((2 * threads + tiles - 1) / tiles));
  const bool sums = kind == InputKind::kSigned8;
  const int64_t work = total * rows * first_weight.columns * g.groups;
  parallel_for(int(tiles) * (threads > 1 ? parts : 1), work < 200000 ? 1 : threads, [&](int i) {
    const int part_count = threads > 1 ? parts : 1, part = i % part_count;
    const int64_t start = i / part_count * tile;
    const int m = int(std::min(tile, total - start));
    const int first_block = units * part / part_count * unit;
    const int last_block = std::min(blocks, units * (part + 1) / part_count * unit);
    auto* origins = reinterpret_cast<int64_t*>(scratch<1>(size_t(m) * 8));
    auto* scales = reinterpret_cast<float*>(scratch<2>(size_t(m) * 4));
    auto* row_sums = reinterpret_cast<int32_t*>(scratch<3>(size_t(m) * segments * 4));
    for (int row = 0; row < m; ++row) {
      const int64_t at = start + row, sample = at / per_sample, place = at % per_sample;
      const int64_t w = place % places[2], h = place / places[2] % places[1], d = place / places[2] / places[1];
      origins[row] = sample * image +
                     ((d * g.stride[0] * padded[1] + h * g.stride[1]) * padded[2] + w * g.stride[2]) * pixel;
      scales[row] = sample_scales[sample] / unit_of(format);
    }
    for (int group = 0; group < g.groups; ++group) {
      const Weight& weight = weights_[group]->weight();
      const uint8_t* data = images + start * pixel;
      if (!identity || sums) {
        const GatherTask task{images,   gathers[group].data(), int(gathers[group].size()), weight.segments, segments, size,
                              row_bytes};
        uint8_t* gathered = scratch<4>(row_bytes * m);
        codes.gather(task, origins, m, gathered, sums ? row_sums : nullptr);
        data = gathered;
      }
      const Input in{m, kind, weights_[group]->max_input(), data, sums ? row_sums : nullptr, nullptr, scales};
      const Output out{y + start * outputs + group * rows, outputs, biases.data() + size_t(group) * blocks * kBlockRows};
      kernels.linear(weight, in, out, first_block, last_block);
    }
  });
  return true;
}

Depthwise::Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry,
                     const InputFormat& input)
    : geometry_(geometry), input_(input), padded_channels_((geometry.channels + kLanes - 1) / kLanes * kLanes) {
  if (geometry.kernel[0] != 1 || geometry.groups != geometry.channels)
    throw std::invalid_argument("the convolution is not one of single channels in one or two dimensions");
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

bool Depthwise::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  const CodeKernels& codes = *kernels().codes;
  const Extent places = geometry_.output(input.size);
  const int64_t elements = volume(input.size) * geometry_.channels;
  const int64_t outputs = volume(places) * geometry_.channels;
  std::vector<float> biases(padded_channels_, 0.0f);
  for (int channel = 0; channel < geometry_.channels; ++channel) {
    biases[channel] = bias ? bias[channel] : 0.0f;
    if (input.offset) biases[channel] = std::fma(*input.offset, sums_[channel], biases[channel]);
  }
  std::atomic<bool> unknown{false};
  const bool divide = threads > 1 && elements * input.batch > 50000;
  const int bands = divide ? std::clamp(places[1] / 4, 1, 2 * threads) : 1;
  std::vector<float> scales(input.batch);
  for (int sample = 0; sample < input.batch; ++sample)
    scales[sample] = sample_scale(input, codes, input.x + sample * elements, elements);
  parallel_for(input.batch * bands, divide ? threads : 1, [&](int i) {
    const int sample = i / bands, band = i % bands;
    const int first = int(int64_t(places[1]) * band / bands), last = int(int64_t(places[1]) * (band + 1) / bands);
    if (!run_rows(input, sample, scales[sample], first, last, biases.data(), y + sample * outputs)) unknown = true;
  });
  return !unknown;
}

// Rows of input are rounded when the first row of outputs needs them, and kept in as many slots as one needs.
bool Depthwise::run_rows(const ConvInput& input, int sample, float scale, int first, int last, const float* bias,
                         float* y) const {
  const ConvGeometry& g = geometry_;
  const CodeKernels& codes = *kernels().codes;
  const Extent padded = g.padded(input.size), places = g.output(input.size);
  const int64_t line = int64_t(input.size[2]) * g.channels, stride = int64_t(padded_channels_);
  const int slots = (g.kernel[1] - 1) * g.dilation[1] + 1;
  const size_t slot = size_t(padded[2]) * padded_channels_;
  auto* ring = reinterpret_cast<float*>(scratch<5>(slot * slots * sizeof(float)));
  std::memset(ring, 0, slot * slots * sizeof(float));
  const float* x = input.x + int64_t(sample) * input.size[1] * line;
  const Rounding rounding = rounding_of(input_, scale, input.offset);
  const int taps = g.kernel[1] * g.kernel[2];
  std::vector<const float*> sources(taps);
  const DepthwiseTask task{weights_.data(), scales_.data(), bias, sources.data(), taps, g.channels, padded_channels_,
                           g.stride[2] * stride, scale / unit_of(input_)};
  bool unknown = false;
  int next = first * g.stride[1];  // row of the padded image to round
  for (int row = first; row < last; ++row) {
    const int top = row * g.stride[1];
    for (next = std::max(next, top); next < top + slots; ++next) {
      float* to = ring + next % slots * slot;
      const int from = next - g.before[1];
      if (from < 0 || from >= input.size[1]) {
        std::memset(to, 0, slot * sizeof(float));
        continue;
      }
      to += g.before[2] * stride;
      if (padded_channels_ == g.channels) {
        unknown |= codes.significands(rounding, InputKind::kFloat, x + from * line, line, to);
      } else {
        for (int w = 0; w < input.size[2]; ++w)
          unknown |= codes.significands(rounding, InputKind::kFloat, x + from * line + int64_t(w) * g.channels, g.channels,
                                        to + w * stride);
      }
    }
    for (int tap = 0; tap < taps; ++tap) {
      const int h = top + tap / g.kernel[2] * g.dilation[1], w = tap % g.kernel[2] * g.dilation[2];
      sources[tap] = ring + h % slots * slot + w * stride;
    }
    codes.depthwise(task, places[2], y + int64_t(row) * places[2] * g.channels);
  }
  return !unknown;
}

}  // namespace dybit
