#include "conv.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "codes.h"
#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr size_t kTileBytes = size_t(1) << 18;  // of gathered rows: they stay in the L2 cache
constexpr int kLeastTile = 96;                  // rows: fewer do not pay for unpacking the weights
constexpr int kMostTile = 1536;                 // rows
constexpr int kPartBlocks = 4;                  // whose results are finished while they are in the L1 cache

}  // namespace

Extent ConvGeometry::output(const Extent& size) const {
  Extent result;
  for (int d = 0; d < 3; ++d) result[d] = (padded(size)[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  return result;
}

std::vector<float> ConvInput::scales(int channels, const InputFormat& format) const {
  if (scale) return std::vector<float>(batch, *scale);
  const CodeKernels& codes = *kernels().codes;
  const int64_t elements = volume(size) * channels;
  std::vector<float> result(batch);
  for (int sample = 0; sample < batch; ++sample)
    result[sample] = dynamic_scale(codes.largest(x + sample * elements, elements), reach, format.top());
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

std::vector<GatherRun> Conv::runs(const PackedWeight& weight, int group, const Extent& padded,
                                  const Image& image) const {
  const ConvGeometry& g = geometry_;
  const int per_group = g.channels / g.groups, taps = int(volume(g.kernel)), element = image.element();
  const Weight& w = weight.weight();
  std::vector<GatherRun> result;
  const Segment* segment = w.segments;
  auto source = [&](int tap, int channel) {
    const Extent k = place_at(tap, g.kernel);
    const int64_t pixel = index_of({k[0] * g.dilation[0], k[1] * g.dilation[1], k[2] * g.dilation[2]}, 0, padded);
    return (pixel * image.pitch + group * per_group + channel) * element;
  };
  for (int column = 0; column < w.columns; ++column) {
    if (column == segment->start + segment->length) ++segment;
    const int to = (segment->chunk * kChunk + column - segment->start) * element;
    const int64_t from =
        g.channel_major ? source(column % taps, column / taps) : source(column / per_group, column % per_group);
    GatherRun* last = result.empty() ? nullptr : &result.back();
    if (last && last->to + last->bytes == to && last->from + last->bytes == from)
      last->bytes += element;
    else
      result.push_back({to, from, element});
  }
  return result;
}

// Whether the places of an image already are the rows of the product.
bool Conv::whole_rows() const {
  const ConvGeometry& g = geometry_;
  return volume(g.kernel) == 1 && g.stride == Extent{1, 1, 1} && !any(g.before) && !any(g.after) && g.groups == 1 &&
         weights_[0]->weight().segment_count == 1;
}

// [groups][blocks · 16], including the contribution of an offset of the inputs.
std::vector<float> Conv::biases(const float* bias, const float* offset) const {
  const int rows = weights_[0]->weight().rows, padded = weights_[0]->weight().blocks * kBlockRows;
  std::vector<float> result(size_t(geometry_.groups) * padded, 0.0f);
  for (int group = 0; group < geometry_.groups; ++group)
    for (int n = 0; n < rows; ++n) {
      float& b = result[size_t(group) * padded + n];
      b = bias ? bias[group * rows + n] : 0.0f;
      if (offset) b = std::fma(*offset, weights_[group]->row_sums()[n], b);
    }
  return result;
}

// One call of a convolution, whose rows are gathered and multiplied tile by tile.
class Conv::Multiplication {
 public:
  Multiplication(const Conv& conv, const Run& run, const Image& image, const Finish& finish)
      : conv_(conv), g_(conv.geometry_), first_(conv.weights_[0]->weight()), kernels_(conv.weights_[0]->kernels()),
        run_(run), image_(image), finish_(finish), padded_(image.padded(run.size)), places_(g_.output(run.size)),
        row_bytes_(size_t(first_.chunk_count) * kChunk * image.element()), unit_(conv.weights_[0]->input().unit()),
        biases_(conv.biases(run.bias, run.offset)), gathers_(g_.groups) {
    in_place_ = conv.whole_rows() && !any(image.before) && !any(image.after) && row_bytes_ == size_t(image.pixel());
    for (int group = 0; !in_place_ && group < g_.groups; ++group)
      gathers_[group] = conv.runs(*conv.weights_[group], group, padded_, image);
  }

  bool all() {
    const int64_t total = volume(places_) * run_.batch;
    const int most = finish_.is_plain() && !finish_.planar ? kMostTile : kLeastTile;
    const int64_t tile = std::clamp<int64_t>(int64_t(kTileBytes / row_bytes_) / 6 * 6, kLeastTile, most);
    const int64_t tiles = (total + tile - 1) / tile;
    // With fewer tiles than threads, the rows of the weights are divided too.
    const int step = kernels_.unit_blocks, units = (first_.blocks + step - 1) / step, threads = run_.threads;
    const int parts =
        threads < 2 || tiles >= 2 * threads ? 1 : std::min<int>(units, int((2 * threads + tiles - 1) / tiles));
    const int64_t work = total * first_.rows * first_.columns * g_.groups;
    parallel_for(int(tiles) * parts, work < kLittleWork ? 1 : threads, [&](int i) {
      const int part = i % parts;
      const int64_t start = i / parts * tile;
      multiply(start, int(std::min(tile, total - start)), units * part / parts * step,
               std::min(first_.blocks, units * (part + 1) / parts * step));
    });
    return !unknown_;
  }

 private:
  // Rows from `start` on, times some blocks of the weights of every group.
  void multiply(int64_t start, int rows, int first_block, int last_block) {
    static thread_local Scratch origin_memory, scale_memory, sum_memory, gathered_memory;
    auto* origins = origin_memory.take<int64_t>(rows);
    auto* scales = scale_memory.take<float>(rows);
    const bool summed = image_.kind == InputKind::kSigned8;
    auto* sums = summed ? sum_memory.take<int32_t>(size_t(rows) * first_.segment_count) : nullptr;
    locate(start, rows, origins, scales);
    for (int group = 0; group < g_.groups; ++group) {
      const PackedWeight& packed = *conv_.weights_[group];
      const uint8_t* data = image_.data + start * image_.pixel();
      if (!in_place_ || summed) {
        const std::vector<GatherRun>& runs = gathers_[group];
        const GatherTask task{image_.data,          runs.data(),      int(runs.size()), packed.weight().segments,
                              first_.segment_count, image_.element(), row_bytes_};
        uint8_t* gathered = in_place_ ? nullptr : gathered_memory.take<uint8_t>(row_bytes_ * rows);
        kernels_.codes->gather(task, origins, rows, gathered, sums);
        if (gathered) data = gathered;
      }
      const Input in{rows, image_.kind, packed.max_input(), data, sums, nullptr, scales};
      const float* bias = biases_.data() + size_t(group) * first_.blocks * kBlockRows;
      if (finish_.is_plain() && !finish_.planar) {
        float* y = finish_.y + start * outputs() + group * first_.rows;
        kernels_.linear(packed.weight(), in, {y, outputs(), bias}, first_block, last_block);
      } else {
        multiply_and_finish(group, in, bias, start, first_block, last_block);
      }
    }
  }

  // Where each row's input starts in the image, in bytes, and its scale.
  void locate(int64_t start, int rows, int64_t* origins, float* scales) const {
    const Extent corner = minus(image_.before, g_.before);
    Cursor at(start, places_);
    for (int row = 0; row < rows; ++row, at.advance(1, places_)) {
      scales[row] = run_.scales[at.sample] / unit_;
      Extent from;
      for (int d = 0; d < 3; ++d) from[d] = corner[d] + at.place[d] * g_.stride[d];
      origins[row] = image_.pixel() * (in_place_ ? start + row : index_of(from, at.sample, padded_));
    }
  }

  // A few blocks at a time.
  void multiply_and_finish(int group, const Input& in, const float* bias, int64_t start, int first_block,
                           int last_block) {
    static thread_local Scratch result_memory;
    const int step = std::max(kernels_.unit_blocks, kPartBlocks), width = step * kBlockRows;
    auto* results = result_memory.take<float>(size_t(in.rows) * width);
    for (int block = first_block; block < last_block; block += step) {
      const int end = std::min(last_block, block + step), channel = block * kBlockRows;
      if (first_.rows < end * kBlockRows)  // zeros behind the last channel
        for (int row = 0; row < in.rows; ++row)
          std::memset(results + row * width + (end - 1 - block) * kBlockRows, 0, kBlockRows * sizeof(float));
      kernels_.linear(conv_.weights_[group]->weight(), in, {results - channel, width, bias}, block, end);
      if (finish_.activation)
        for (int row = 0; row < in.rows; ++row) {
          float* of_row = results + row * width;
          kernels_.rows->unary(*finish_.activation, of_row, (end - block) * kBlockRows, of_row);
        }
      const int first = group * first_.rows;
      const Results given{results, width, true, start, in.rows, first + channel,
                          first + std::min(first_.rows, end * kBlockRows)};
      if (finish_.planar)
        store_planar(given, places_, outputs(), finish_.y);
      else if (finish_some(*kernels_.codes, finish_, places_, outputs(), given)) unknown_ = true;
    }
  }

  int outputs() const { return first_.rows * g_.groups; }

  const Conv& conv_;
  const ConvGeometry& g_;
  const Weight& first_;  // the others have its layout
  const Kernels& kernels_;
  const Run& run_;
  const Image& image_;
  const Finish& finish_;
  const Extent padded_, places_;
  const size_t row_bytes_;
  const float unit_;
  const std::vector<float> biases_;
  std::vector<std::vector<GatherRun>> gathers_;  // of each group
  bool in_place_;                                // rows are not gathered
  std::atomic<bool> unknown_{false};
};

bool Conv::multiply(const Run& run, const Image& image, const Finish& finish) const {
  if (volume(geometry_.output(run.size)) * run.batch == 0) return true;
  bool known;
  return run_panels(run, image, finish, &known) ? known : Multiplication(*this, run, image, finish).all();
}

Image Conv::image() const {
  const PackedWeight& first = *weights_[0];
  const int pitch = whole_rows() ? first.weight().chunk_count * kChunk : geometry_.channels;
  return {nullptr, first.kind(), geometry_.before, geometry_.after, geometry_.channels, pitch};
}

bool Conv::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  if (!alike_) return false;
  const Image made = image();
  const int64_t outputs = int64_t(weights_[0]->weight().rows) * geometry_.groups;
  return input.by_samples(volume(made.padded(input.size)) * made.pixel(), volume(input.size) * geometry_.channels, y,
                          volume(geometry_.output(input.size)) * outputs, threads,
                          [&](const ConvInput& some, float* to) { return run_some(some, to, bias, threads); });
}

bool Conv::run_some(const ConvInput& input, float* y, const float* bias, int threads) const {
  static thread_local Scratch image_memory;
  const PackedWeight& first = *weights_[0];
  Image image = this->image();
  image.data = image_memory.take<uint8_t>(size_t(volume(image.padded(input.size))) * image.pixel() * input.batch);
  const std::vector<float> scales = input.scales(geometry_.channels, first.input());
  std::vector<Rounding> roundings;
  for (float scale : scales) roundings.push_back(first.input().rounding(scale, input.offset));
  if (!round_to_image(input.x, input.batch, input.size, roundings.data(), true, image, threads, input.planar))
    return false;
  return multiply({input.batch, input.size, scales.data(), input.offset, bias, threads}, image,
                  Finish::plain(y, input.planar));
}

bool Conv::run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
               const Finish& finish, int threads) const {
  if (!alike_) return false;
  static thread_local Scratch wide_memory;
  const std::vector<float> scales(batch, scale);
  const InputKind kind = weights_[0]->kind();
  Image given = image;
  if (kind != image.kind) {  // wide weights take wide inputs
    if (kind != InputKind::kSigned16) return false;
    const int64_t count = volume(image.padded(size)) * image.pitch * batch;
    given.kind = kind;
    given.data = reinterpret_cast<uint8_t*>(wide_memory.take<int16_t>(count));
    weights_[0]->kernels().codes->convert(image.kind, image.data, count, kind, given.data);
  }
  if (finish.image) fill_border(*finish.image, batch, geometry_.output(size), finish.rounding);
  return multiply({batch, size, scales.data(), offset, bias, threads}, given, finish);
}

}  // namespace dybit
