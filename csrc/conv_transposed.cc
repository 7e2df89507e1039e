#include "conv_transposed.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int64_t kAtOnce = 1 << 16;  // results of a product that stay in the L2 cache

void add(const float* from, int64_t count, float* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] += from[i];
}

}  // namespace

ConvTransposed::ConvTransposed(std::vector<const PackedWeight*> weights, const ConvGeometry& geometry)
    : weights_(std::move(weights)), geometry_(geometry) {
  const int64_t taps = volume(geometry.kernel);
  for (const PackedWeight* weight : weights_)
    if (weight->weight().columns * geometry.groups != geometry.channels || weight->weight().rows % taps ||
        weight->weight().rows != weights_[0]->weight().rows || int(weights_.size()) != geometry.groups)
      throw std::invalid_argument("the weights do not fit the convolution");
}

struct ConvTransposed::Sample {
  const float* x;  // of the sample
  bool planar;
  Extent size, places;
  const float* scale;  // or null
  const float* offset;
  float* y;  // [places][outputs]
};

bool ConvTransposed::run(const ConvInput& input, const Extent& places, float* y, const float* bias,
                         int threads) const {
  const InputFormat& format = weights_[0]->input();
  const int64_t all = volume(places), outputs = int64_t(this->outputs()) * geometry_.groups;
  const int64_t inputs = volume(input.size) * geometry_.channels;
  std::vector<float> scales(input.batch, 1.0f);
  if (format.quantized) scales = input.scales(geometry_.channels, format);
  for (float scale : scales)
    if (!std::isfinite(scale)) return false;
  const bool by_sample = input.batch >= threads;  // else the products are divided
  parallel_for(input.batch, by_sample ? threads : 1, [&](int i) {
    static thread_local Scratch sum_memory;
    float* to = y + i * all * outputs;
    float* sums = input.planar ? sum_memory.take<float>(size_t(all * outputs)) : to;
    for (int64_t place = 0; place < all; ++place)
      if (bias)
        std::memcpy(sums + place * outputs, bias, outputs * sizeof(float));
      else
        std::memset(sums + place * outputs, 0, outputs * sizeof(float));
    const Sample sample{input.x + i * inputs, input.planar, input.size, places, format.quantized ? &scales[i] : nullptr,
                        input.offset, sums};
    for (int group = 0; group < geometry_.groups; ++group) add_group(sample, group, by_sample ? 1 : threads);
    if (input.planar) store_planar({sums, outputs, false, 0, int(all), 0, int(outputs)}, places, int(outputs), to);
  });
  return true;
}

// Adds the results of one place: [kernel positions][outputs of the group].
void ConvTransposed::add_kernel(const Sample& sample, const Extent& place, const float* from, int group) const {
  const ConvGeometry& g = geometry_;
  const Extent& places = sample.places;
  const int count = outputs(), width = g.kernel[2], by = g.dilation[2];
  const int64_t stride = int64_t(count) * g.groups;
  Extent corner;
  for (int d = 0; d < 3; ++d) corner[d] = place[d] * g.stride[d] - g.before[d];
  // The kernel positions of a line that lie inside.
  const int first = corner[2] < 0 ? (by - 1 - corner[2]) / by : 0, left = places[2] - corner[2];
  const int last = left <= 0 ? 0 : std::min(width, (left + by - 1) / by);
  const bool together = by == 1 && g.groups == 1;  // their results follow each other
  for (int i = 0; i < g.kernel[0] * g.kernel[1]; ++i, from += width * count) {
    const int d = corner[0] + i / g.kernel[1] * g.dilation[0], h = corner[1] + i % g.kernel[1] * g.dilation[1];
    if (d < 0 || d >= places[0] || h < 0 || h >= places[1] || first >= last) continue;
    float* line = sample.y + index_of({d, h, corner[2]}, 0, places) * stride + group * count;
    if (together) {
      add(from + first * count, (last - first) * count, line + first * stride);
      continue;
    }
    for (int k = first; k < last; ++k) add(from + k * count, count, line + k * by * stride);
  }
}

void ConvTransposed::add_group(const Sample& sample, int group, int threads) const {
  static thread_local Scratch row_memory, result_memory;
  const ConvGeometry& g = geometry_;
  const PackedWeight& weight = *weights_[group];
  const int channels = g.channels / g.groups;
  const int64_t pixels = volume(sample.size), wide = volume(g.kernel) * outputs();
  const int step = int(std::clamp<int64_t>(kAtOnce / wide / kLanes * kLanes, kLanes, 1024));
  auto* results = result_memory.take<float>(size_t(step * wide));
  for (int64_t start = 0; start < pixels; start += step) {
    const int rows = int(std::min<int64_t>(step, pixels - start));
    const float* x = sample.x + start * channels;
    if (sample.planar || g.groups > 1) {
      auto* turned = row_memory.take<float>(size_t(rows) * channels);
      const float* from = sample.x + start * g.channels + group * channels;
      if (sample.planar)
        kernels().rows->transpose(sample.x + group * channels * pixels + start, pixels, channels, rows, turned,
                                  channels);
      else
        for (int row = 0; row < rows; ++row)
          std::memcpy(turned + row * channels, from + int64_t(row) * g.channels, channels * sizeof(float));
      x = turned;
    }
    weight.linear(x, rows, results, nullptr, sample.scale, sample.offset, 1.0f, threads);
    Cursor cursor(start, sample.size);
    for (int row = 0; row < rows; ++row, cursor.advance(1, sample.size))
      add_kernel(sample, cursor.place, results + row * wide, group);
  }
}

}  // namespace dybit
