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
constexpr int kPartBlocks = 4;                  // whose results are finished while they are in the L1 cache
constexpr int64_t kLittle = 50000;              // elements that are not worth a second thread
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t volume(const Extent& extent) { return int64_t(extent[0]) * extent[1] * extent[2]; }

bool any(const Extent& extent) { return extent[0] || extent[1] || extent[2]; }

Extent minus(const Extent& a, const Extent& b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2]}; }

Extent padded_by(const Extent& before, const Extent& size, const Extent& after) {
  Extent result;
  for (int d = 0; d < 3; ++d) result[d] = before[d] + size[d] + after[d];
  return result;
}

Extent at_place(int64_t place, const Extent& places) {
  return {int(place / places[2] / places[1]), int(place / places[2] % places[1]), int(place % places[2])};
}

// A place among those of all samples, in order.
struct Cursor {
  Extent place;
  int64_t sample;

  Cursor(int64_t index, const Extent& places) {
    const int64_t per_sample = int64_t(places[0]) * places[1] * places[2];
    place = at_place(index % per_sample, places);
    sample = index / per_sample;
  }

  // Within a line, or to the start of the next. Whether to the next.
  bool advance(int count, const Extent& places) {
    place[2] += count;
    if (place[2] < places[2]) return false;
    place[2] = 0;
    if (++place[1] == places[1]) {
      place[1] = 0;
      if (++place[0] == places[0]) {
        place[0] = 0;
        ++sample;
      }
    }
    return true;
  }
};

// Where in an image a place of a sample lies, in places.
int64_t inside(const Extent& place, int64_t sample, const Extent& padded) {
  return ((sample * padded[0] + place[0]) * padded[1] + place[1]) * padded[2] + place[2];
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

// Zeros in the border of an image.
void clear_border(const Image& image, int batch, const Extent& size) {
  if (!any(image.before) && !any(image.after)) return;
  const Extent padded = image.padded(size);
  const size_t pixel = size_t(image.pitch) * image.element(), line = pixel * padded[2];
  uint8_t* to = image.data;
  for (int i = 0; i < batch * padded[0] * padded[1]; ++i, to += line) {
    const int d = i / padded[1] % padded[0] - image.before[0], h = i % padded[1] - image.before[1];
    if (d < 0 || d >= size[0] || h < 0 || h >= size[1]) {
      std::memset(to, 0, line);
    } else {
      std::memset(to, 0, pixel * image.before[2]);
      std::memset(to + line - pixel * image.after[2], 0, pixel * image.after[2]);
    }
  }
}

// Finishes some channels of `rows` results, which lie [rows][from_stride] and are those of the places from `start` on.
bool finish_some(const CodeKernels& codes, const Finish& finish, const Extent& places, int channels, const float* from,
                 int64_t from_stride, bool from_padded, int64_t start, int rows, int first, int last) {
  const Image* image = finish.image;
  const int64_t at = start * channels + first;
  FinishTask task{from,
                  from_stride,
                  from_padded,
                  finish.addend ? finish.addend + at : nullptr,
                  finish.y ? finish.y + at : nullptr,
                  channels,
                  finish.low,
                  finish.high,
                  &finish.rounding,
                  image ? image->kind : InputKind::kUnsigned8,
                  nullptr,
                  last - first,
                  image && last == channels ? image->pitch - first : last - first};
  if (!image) return codes.finish(task, rows);
  const Extent padded = image->padded(places);
  const int64_t pixel = int64_t(image->pitch) * image->element();
  Cursor at_row(start, places);
  auto target = [&] {
    const Extent& p = at_row.place;
    const Extent inner{p[0] + image->before[0], p[1] + image->before[1], p[2] + image->before[2]};
    return image->data + inside(inner, at_row.sample, padded) * pixel + int64_t(first) * image->element();
  };
  // Where nothing lies between places, those of a line are one row.
  if (image->pitch == channels && from_stride == channels && first == 0 && last == channels) {
    bool unknown = false;
    for (int row = 0, count; row < rows; row += count) {
      count = std::min(rows - row, places[2] - at_row.place[2]);
      uint8_t* to = target();
      task.images = &to;
      task.channels = task.padded = count * channels;
      unknown |= codes.finish(task, 1);
      task.from += int64_t(count) * channels;
      if (task.addend) task.addend += int64_t(count) * channels;
      if (task.y) task.y += int64_t(count) * channels;
      at_row.advance(count, places);
    }
    return unknown;
  }
  auto** targets = reinterpret_cast<uint8_t**>(scratch<6>(size_t(rows) * sizeof(uint8_t*)));
  uint8_t* to = target();
  for (int row = 0; row < rows; ++row) {
    targets[row] = to;
    to = at_row.advance(1, places) ? target() : to + pixel;
  }
  task.images = targets;
  return codes.finish(task, rows);
}

}  // namespace

Extent ConvGeometry::padded(const Extent& size) const { return padded_by(before, size, after); }

Extent Image::padded(const Extent& size) const { return padded_by(before, size, after); }

bool Finish::plain() const { return !addend && !image && low == -kInfinity && high == kInfinity; }

bool round_to_image(const float* x, int batch, const Extent& size, const Rounding* rounding, bool by_sample,
                    const Image& image, int threads) {
  const CodeKernels& codes = *kernels().codes;
  const int64_t places = volume(size), step = std::max<int64_t>(1, (1 << 14) / image.channels);
  const int steps = int((places + step - 1) / step);
  clear_border(image, batch, size);
  std::atomic<bool> unknown{false};
  parallel_for(batch * steps, places * batch * image.channels < kLittle ? 1 : threads, [&](int i) {
    const int64_t sample = i / steps, start = i % steps * step;
    const int rows = int(std::min(step, places - start));
    const Finish finish{nullptr, nullptr, -kInfinity, kInfinity, &image, rounding[by_sample ? sample : 0]};
    const int64_t at = sample * places + start;
    if (finish_some(codes, finish, size, image.channels, x + at * image.channels, image.channels, false, at, rows, 0,
                    image.channels))
      unknown = true;
  });
  return !unknown;
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

std::vector<GatherRun> Conv::runs(const PackedWeight& weight, int group, const Extent& padded, const Image& image) const {
  const ConvGeometry& g = geometry_;
  const int per_group = g.channels / g.groups, taps = int(volume(g.kernel)), element = image.element();
  const Weight& w = weight.weight();
  std::vector<GatherRun> result;
  const Segment* segment = w.segments;
  auto source = [&](int tap, int channel) {
    const Extent k = at_place(tap, g.kernel);
    const int64_t pixel = inside({k[0] * g.dilation[0], k[1] * g.dilation[1], k[2] * g.dilation[2]}, 0, padded);
    return (pixel * image.pitch + group * per_group + channel) * element;
  };
  for (int column = 0; column < w.columns; ++column) {
    if (column == segment->start + segment->length) ++segment;
    const int to = (segment->chunk * kChunk + column - segment->start) * element;
    const int64_t from = g.channel_major ? source(column % taps, column / taps) : source(column / per_group, column % per_group);
    if (!result.empty() && result.back().to + result.back().bytes == to && result.back().from + result.back().bytes == from)
      result.back().bytes += element;
    else
      result.push_back({to, from, element});
  }
  return result;
}

// Whether the rows of the product are the places of an image, as they lie.
bool Conv::whole_rows() const {
  const ConvGeometry& g = geometry_;
  return volume(g.kernel) == 1 && g.stride == Extent{1, 1, 1} && !any(g.before) && !any(g.after) && g.groups == 1 &&
         weights_[0]->weight().segment_count == 1;
}

struct Conv::Run {
  int batch;
  Extent size;
  const float* scales;  // of every sample
  const float* offset;  // or null
  int threads;
};

bool Conv::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  if (!alike_) return false;
  const CodeKernels& codes = *weights_[0]->kernels().codes;
  const int64_t elements = volume(input.size) * geometry_.channels;
  const int pitch = whole_rows() ? weights_[0]->weight().chunk_count * kChunk : geometry_.channels;
  Image image{nullptr, weights_[0]->kind(), geometry_.before, geometry_.after, geometry_.channels, pitch};
  image.data = scratch<0>(size_t(volume(image.padded(input.size))) * pitch * image.element() * input.batch);
  std::vector<float> scales(input.batch);
  std::vector<Rounding> roundings(input.batch);
  for (int sample = 0; sample < input.batch; ++sample) {
    scales[sample] = sample_scale(input, codes, input.x + sample * elements, elements);
    roundings[sample] = rounding_of(weights_[0]->input(), scales[sample], input.offset);
  }
  if (!round_to_image(input.x, input.batch, input.size, roundings.data(), true, image, threads)) return false;
  const Finish finish{y, nullptr, -kInfinity, kInfinity, nullptr, {}};
  return multiply({input.batch, input.size, scales.data(), input.offset, threads}, image, bias, finish);
}

bool Conv::run(const Image& image, int batch, const Extent& size, float scale, const float* offset, const float* bias,
               const Finish& finish, int threads) const {
  if (!alike_) return false;
  const std::vector<float> scales(batch, scale);
  const InputKind kind = weights_[0]->kind();
  Image given = image;
  if (kind != image.kind) {  // wide weights want wide inputs
    if (kind != InputKind::kSigned16) return false;
    const int64_t count = volume(image.padded(size)) * image.pitch * batch;
    given.kind = kind;
    given.data = scratch<0>(size_t(count) * 2);
    weights_[0]->kernels().codes->convert(image.kind, image.data, count, kind, given.data);
  }
  if (finish.image) clear_border(*finish.image, batch, geometry_.output(size));
  return multiply({batch, size, scales.data(), offset, threads}, given, bias, finish);
}

bool Conv::multiply(const Run& run, const Image& image, const float* bias, const Finish& finish) const {
  const ConvGeometry& g = geometry_;
  const Kernels& kernels = weights_[0]->kernels();
  const CodeKernels& codes = *kernels.codes;
  const InputKind kind = image.kind;
  const int size = image.element(), batch = run.batch, threads = run.threads;
  const Extent padded = image.padded(run.size), places = g.output(run.size), corner = minus(image.before, g.before);
  const int64_t pixel = int64_t(image.pitch) * size, per_sample = volume(places);

  const int rows = weights_[0]->weight().rows, outputs = rows * g.groups, blocks = weights_[0]->weight().blocks;
  std::vector<float> biases(size_t(g.groups) * blocks * kBlockRows, 0.0f);
  for (int group = 0; group < g.groups; ++group)
    for (int n = 0; n < rows; ++n) {
      float& b = biases[size_t(group) * blocks * kBlockRows + n];
      b = bias ? bias[group * rows + n] : 0.0f;
      if (run.offset) b = std::fma(*run.offset, weights_[group]->row_sums()[n], b);
    }

  const Weight& first_weight = weights_[0]->weight();
  const size_t row_bytes = size_t(first_weight.chunk_count) * kChunk * size;
  const int segments = first_weight.segment_count;
  const bool identity =
      whole_rows() && !any(image.before) && !any(image.after) && row_bytes == size_t(pixel);
  const bool sums = kind == InputKind::kSigned8;
  std::vector<std::vector<GatherRun>> gathers(g.groups);
  if (!identity)
    for (int group = 0; group < g.groups; ++group) gathers[group] = runs(*weights_[group], group, padded, image);

  const bool direct = finish.plain();
  const float unit = unit_of(weights_[0]->input());
  const int64_t total = per_sample * batch;
  if (total == 0) return true;
  const int64_t tile = std::clamp<int64_t>(int64_t(kTileBytes / row_bytes) / 6 * 6, kLeastTile, direct ? 1536 : 96);
  const int64_t tiles = (total + tile - 1) / tile;
  // Where there are fewer tiles than threads, the rows of the weights are divided, too.
  const int step_blocks = kernels.unit_blocks, units = (blocks + step_blocks - 1) / step_blocks;
  const int parts = tiles >= 2 * threads ? 1 : std::min<int>(units, int((2 * threads + tiles - 1) / tiles));
  const int64_t work = total * rows * first_weight.columns * g.groups;
  std::atomic<bool> unknown{false};
  parallel_for(int(tiles) * (threads > 1 ? parts : 1), work < 200000 ? 1 : threads, [&](int i) {
    const int part_count = threads > 1 ? parts : 1, part = i % part_count;
    const int64_t start = i / part_count * tile;
    const int m = int(std::min(tile, total - start));
    const int first_block = units * part / part_count * step_blocks;
    const int last_block = std::min(blocks, units * (part + 1) / part_count * step_blocks);
    auto* origins = reinterpret_cast<int64_t*>(scratch<1>(size_t(m) * 8));
    auto* scales = reinterpret_cast<float*>(scratch<2>(size_t(m) * 4));
    auto* row_sums = reinterpret_cast<int32_t*>(scratch<3>(size_t(m) * segments * 4));
    Cursor at(start, places);
    for (int row = 0; row < m; ++row, at.advance(1, places)) {
      scales[row] = run.scales[at.sample] / unit;
      const Extent& p = at.place;
      origins[row] = pixel * (identity ? start + row
                                       : inside({corner[0] + p[0] * g.stride[0], corner[1] + p[1] * g.stride[1],
                                                 corner[2] + p[2] * g.stride[2]}, at.sample, padded));
    }
    for (int group = 0; group < g.groups; ++group) {
      const Weight& weight = weights_[group]->weight();
      const uint8_t* data = image.data + start * pixel;
      if (!identity || sums) {
        const GatherTask task{image.data, gathers[group].data(), int(gathers[group].size()), weight.segments, segments,
                              size,       row_bytes};
        uint8_t* gathered = identity ? nullptr : scratch<4>(row_bytes * m);
        codes.gather(task, origins, m, gathered, sums ? row_sums : nullptr);
        if (gathered) data = gathered;
      }
      const Input in{m, kind, weights_[group]->max_input(), data, sums ? row_sums : nullptr, nullptr, scales};
      const float* b = biases.data() + size_t(group) * blocks * kBlockRows;
      if (direct) {
        kernels.linear(weight, in, {finish.y + start * outputs + group * rows, outputs, b}, first_block, last_block);
        continue;
      }
      const int step = std::max(step_blocks, kPartBlocks), width = step * kBlockRows;
      auto* results = reinterpret_cast<float*>(scratch<7>(size_t(m) * width * sizeof(float)));
      for (int block = first_block; block < last_block; block += step) {
        const int end = std::min(last_block, block + step), channel = block * kBlockRows;
        if (rows < end * kBlockRows)
          for (int row = 0; row < m; ++row) std::memset(results + row * width + (end * kBlockRows - kBlockRows - channel), 0, 64);
        kernels.linear(weight, in, {results - channel, width, b}, block, end);
        if (finish_some(codes, finish, places, outputs, results, width, true, start, m, group * rows + channel,
                        group * rows + std::min(rows, end * kBlockRows)))
          unknown = true;
      }
    }
  });
  return !unknown;
}

Depthwise::Depthwise(const float* significands, const float* scales, const ConvGeometry& geometry,
                     const InputFormat& input)
    : geometry_(geometry), input_(input), padded_channels_((geometry.channels + kLanes - 1) / kLanes * kLanes) {
  if (geometry.groups != geometry.channels)
    throw std::invalid_argument("the convolution is not one of single channels");
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

std::vector<float> Depthwise::biases(const float* bias, const float* offset) const {
  std::vector<float> result(padded_channels_, 0.0f);
  for (int channel = 0; channel < geometry_.channels; ++channel) {
    result[channel] = bias ? bias[channel] : 0.0f;
    if (offset) result[channel] = std::fma(*offset, sums_[channel], result[channel]);
  }
  return result;
}

// What is convolved: FP32 inputs that are rounded on the way, or an image.
struct Depthwise::Source {
  const float* x;  // or null
  const Image* image;
  int batch;
  Extent size;
  const float* scales;  // of every sample
  const float* offset;  // of x, or null
};

// Some lines of one plane of the outputs of a sample.
struct Depthwise::Band {
  int sample, plane, first, last;
};

bool Depthwise::run(const ConvInput& input, float* y, const float* bias, int threads) const {
  const CodeKernels& codes = *kernels().codes;
  const int64_t elements = volume(input.size) * geometry_.channels;
  std::vector<float> scales(input.batch);
  for (int sample = 0; sample < input.batch; ++sample)
    scales[sample] = sample_scale(input, codes, input.x + sample * elements, elements);
  const Finish finish{y, nullptr, -kInfinity, kInfinity, nullptr, {}};
  return run_bands({input.x, nullptr, input.batch, input.size, scales.data(), input.offset},
                   biases(bias, input.offset), finish, threads);
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
  const int bands = divide ? std::clamp(lines / 4, 1, 2 * threads) : 1;
  std::atomic<bool> unknown{false};
  parallel_for(source.batch * planes * bands, divide ? threads : 1, [&](int i) {
    const int band = i % bands, plane = i / bands % planes, sample = i / bands / planes;
    const int first = int(int64_t(lines) * band / bands), last = int(int64_t(lines) * (band + 1) / bands);
    if (!run_band(source, {sample, plane, first, last}, bias.data(), finish)) unknown = true;
  });
  return !unknown;
}

// Lines of input become FP32 when the first line of outputs needs them, and are kept in as many slots as one needs: a ring
// for every plane of the kernel.
bool Depthwise::run_band(const Source& source, const Band& band, const float* bias, const Finish& finish) const {
  const ConvGeometry& g = geometry_;
  const CodeKernels& codes = *kernels().codes;
  const Extent size = source.size, padded = g.padded(size), places = g.output(size);
  const Image* image = source.image;
  const int64_t line = int64_t(size[2]) * g.channels;
  const int64_t stride = image && image->pitch >= padded_channels_ ? image->pitch : padded_channels_;
  const int slots = (g.kernel[1] - 1) * g.dilation[1] + 1, depth = g.kernel[0];
  const size_t slot = size_t(padded[2]) * stride;
  const size_t bytes = slot * slots * depth * sizeof(float);
  auto* ring = reinterpret_cast<float*>(scratch<5>(bytes));
  if (!image || image->pitch != stride) std::memset(ring, 0, bytes);
  const float* x = image ? nullptr : source.x + int64_t(band.sample) * size[0] * size[1] * line;
  const float scale = source.scales[band.sample];
  const Rounding rounding = rounding_of(input_, scale, source.offset);
  const int taps = int(volume(g.kernel));
  std::vector<const float*> sources(taps);
  const DepthwiseTask task{weights_.data(), scales_.data(), bias, sources.data(), taps, g.channels, padded_channels_,
                           g.stride[2] * stride, scale / unit_of(input_)};
  const bool plain = finish.plain();
  float* results = plain ? nullptr : reinterpret_cast<float*>(scratch<7>(size_t(places[2]) * g.channels * sizeof(float)));
  bool unknown = false;
  // Converts a line of an image, border and all; rounds a line of inputs. Planes and lines are those of the padded input.
  auto from_image = [&](int d, int h, float* to) {
    const Extent whole = image->padded(size), corner = minus(image->before, g.before);
    const uint8_t* from = image->data + inside({corner[0] + d, corner[1] + h, corner[2]}, band.sample, whole) *
                                            image->pitch * image->element();
    if (image->pitch == stride) {
      codes.convert(image->kind, from, int64_t(slot), InputKind::kFloat, to);
    } else {
      for (int w = 0; w < padded[2]; ++w)
        codes.convert(image->kind, from + size_t(w) * image->pitch * image->element(), g.channels, InputKind::kFloat,
                      to + w * stride);
    }
  };
  auto from_input = [&](int d, int h, float* to) {
    d -= g.before[0], h -= g.before[1];
    if (d < 0 || d >= size[0] || h < 0 || h >= size[1]) {
      std::memset(to, 0, slot * sizeof(float));
      return;
    }
    to += g.before[2] * stride;
    const float* from = x + (int64_t(d) * size[1] + h) * line;
    if (stride == g.channels) {
      unknown |= codes.significands(rounding, InputKind::kFloat, from, line, to);
    } else {
      for (int w = 0; w < size[2]; ++w)
        unknown |= codes.significands(rounding, InputKind::kFloat, from + int64_t(w) * g.channels, g.channels,
                                      to + w * stride);
    }
  };
  const int front = band.plane * g.stride[0];
  int next = band.first * g.stride[1];
  for (int row = band.first; row < band.last; ++row) {
    const int top = row * g.stride[1];
    for (next = std::max(next, top); next < top + slots; ++next)
      for (int k = 0; k < depth; ++k) {
        const int d = front + k * g.dilation[0];
        float* to = ring + (size_t(k) * slots + next % slots) * slot;
        image ? from_image(d, next, to) : from_input(d, next, to);
      }
    for (int tap = 0; tap < taps; ++tap) {
      const Extent k = at_place(tap, g.kernel);
      const int h = top + k[1] * g.dilation[1], w = k[2] * g.dilation[2];
      sources[tap] = ring + (size_t(k[0]) * slots + h % slots) * slot + w * stride;
    }
    const int64_t start = inside({band.plane, row, 0}, band.sample, places);
    codes.depthwise(task, places[2], plain ? finish.y + start * g.channels : results);
    if (!plain)
      unknown |= finish_some(codes, finish, places, g.channels, results, g.channels, false, start, places[2], 0, g.channels);
  }
  return !unknown;
}

}  // namespace dybit
