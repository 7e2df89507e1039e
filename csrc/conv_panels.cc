// Convolutions by the addresses of their inputs: no rows are gathered, and results are finished in registers.
#include <algorithm>
#include <atomic>
#include <limits>

#include "codes.h"
#include "conv.h"
#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr size_t kTileBytes = size_t(1) << 18;    // of inputs: they stay in the L2 cache
constexpr int kLeastTile = 96, kMostTile = 1536;  // rows
constexpr int kResults = 1 << 16;                 // of a tile that are not finished: they stay in the L2 cache
constexpr int kFewRows = 4;                       // so many do not pay for reading unpacked weights

// An element of a row that a column of the weight is multiplied with.
struct Element {
  int32_t line, at;  // as those of Word
  int column;
};

}  // namespace

// A line of the inputs is what lies side by side for one kernel position in depth and height. Words do not pass its
// ends, so they do not pass those of the image.
std::vector<Word> Conv::words(int pitch) const {
  const ConvGeometry& g = geometry_;
  const Weight& w = weights_[0]->weight();
  const int taps = int(volume(g.kernel)), per_group = g.channels / g.groups;
  const int element = element_bytes(weights_[0]->kind());
  const int32_t end = ((g.kernel[2] - 1) * g.dilation[2] * pitch + per_group) * element;
  std::vector<Word> result;
  if (end < 4) return result;
  for (int s = 0; s < w.segment_count; ++s) {
    std::vector<Element> elements;
    for (int column = w.segments[s].start; column < w.segments[s].start + w.segments[s].length; ++column) {
      const int tap = g.channel_major ? column % taps : column / per_group;
      const int channel = g.channel_major ? column / taps : column % per_group;
      const int along = tap % g.kernel[2] * g.dilation[2];
      elements.push_back({tap / g.kernel[2], (along * pitch + channel) * element, column});
    }
    std::sort(elements.begin(), elements.end(), [](const Element& a, const Element& b) {
      return a.line < b.line || (a.line == b.line && a.at < b.at);
    });
    int count = 0;
    for (auto next = elements.begin(); next != elements.end(); ++count) {
      Word word{s, next->line, std::min(next->at, end - 4), {Word::kNone, Word::kNone, Word::kNone, Word::kNone}};
      for (; next != elements.end() && next->line == word.line && next->at + element <= word.at + 4; ++next)
        word.columns[(next->at - word.at) / element] = next->column;
      result.push_back(word);
    }
    for (const int multiple = weights_[0]->kernels().panels->segment_words; count % multiple; ++count) {
      result.push_back(result.back());
      result.back().columns.fill(Word::kNone);
    }
  }
  return result;
}

// Unpacks the weights at the first call for a pitch. Another matters only if words may span several pixels.
const Conv::Unpacked* Conv::unpacked(int pitch) const {
  if (!weights_[0]->kernels().panels) return nullptr;
  if (geometry_.kernel[2] == 1) pitch = geometry_.channels;
  std::lock_guard<std::mutex> lock(*mutex_);
  for (const auto& made : unpacked_)
    if (made->pitch == pitch) return made.get();
  auto made = std::make_unique<Unpacked>();
  made->pitch = pitch;
  made->words = words(pitch);
  for (const PackedWeight* weight : weights_)
    if (!made->words.empty()) made->groups.emplace_back(*weight, made->words, *weight->kernels().panels);
  unpacked_.push_back(std::move(made));
  return unpacked_.back().get();
}

// One call of a convolution, whose rows are multiplied tile by tile.
class Conv::PanelProduct {
 public:
  PanelProduct(const Conv& conv, const Unpacked& unpacked, const Run& run, const Image& image, const Finish& finish)
      : conv_(conv), g_(conv.geometry_), first_(conv.weights_[0]->weight()), unpacked_(unpacked), run_(run),
        image_(image), finish_(finish), padded_(image.padded(run.size)), places_(g_.output(run.size)),
        unit_(conv.weights_[0]->input().unit()), biases_(conv.biases(run.bias, run.offset)),
        apart_(finish.planar || finish.activation) {}

  // Finds the words in the image. Returns false if a row has none, or if offsets do not fit 32 bits.
  bool prepare() {
    if (unpacked_.words.empty()) return false;
    if (volume(padded_) * image_.pixel() > std::numeric_limits<int32_t>::max()) return false;
    offsets_.reserve(unpacked_.words.size());
    for (const Word& word : unpacked_.words) {
      const Extent k{word.line / g_.kernel[1] * g_.dilation[0], word.line % g_.kernel[1] * g_.dilation[1], 0};
      offsets_.push_back(int32_t(index_of(k, 0, padded_) * image_.pixel()) + word.at);
    }
    return true;
  }

  bool all() {
    const int64_t total = volume(places_) * run_.batch;
    int64_t wanted = int64_t(kTileBytes / (unpacked_.words.size() * 4)) / 6 * 6;
    if (apart_) wanted = std::min<int64_t>(wanted, kResults / first_.rows / 6 * 6);
    const int64_t tile = std::clamp<int64_t>(wanted, kLeastTile, kMostTile), tiles = (total + tile - 1) / tile;
    // With fewer tiles than threads, the rows of the weights are divided too.
    const int units = unpacked_.groups[0].panels().unit_count, threads = run_.threads;
    const int parts =
        threads < 2 || tiles >= 2 * threads ? 1 : std::min<int>(units, int((2 * threads + tiles - 1) / tiles));
    const bool little = total * first_.rows * first_.columns * g_.groups < kLittleWork;
    parallel_for(int(tiles) * parts, little ? 1 : threads, [&](int i) {
      const int part = i % parts;
      const int64_t start = i / parts * tile;
      multiply(start, int(std::min(tile, total - start)), units * part / parts, units * (part + 1) / parts);
    });
    return !unknown_;
  }

 private:
  // Rows from `start` on, times some units of the weights of every group.
  void multiply(int64_t start, int rows, int first_unit, int last_unit) {
    static thread_local Scratch input_memory, scale_memory, place_memory, result_memory;
    auto** inputs = input_memory.take<const uint8_t*>(rows);
    auto* scales = scale_memory.take<float>(rows);
    const Extent corner = minus(image_.before, g_.before);
    Cursor cursor(start, places_);
    for (int row = 0; row < rows; ++row, cursor.advance(1, places_)) {
      scales[row] = run_.scales[cursor.sample] / unit_;
      Extent from;
      for (int d = 0; d < 3; ++d) from[d] = corner[d] + cursor.place[d] * g_.stride[d];
      inputs[row] = image_.data + index_of(from, cursor.sample, padded_) * image_.pixel();
    }
    const Image* to = apart_ ? nullptr : finish_.image;
    uint8_t** places = nullptr;
    if (to) {
      places = place_memory.take<uint8_t*>(rows);
      find_places(*to, places_, start, rows, places);
    }
    const int outputs = first_.rows * g_.groups;
    auto* results = apart_ ? result_memory.take<float>(size_t(rows) * first_.rows) : nullptr;
    for (int group = 0; group < g_.groups; ++group) {
      const int64_t shift = int64_t(group) * (g_.channels / g_.groups) * image_.element();
      const int first = group * first_.rows;
      const int64_t at = start * outputs + first;
      const Ending ending{biases_.data() + size_t(group) * first_.blocks * kBlockRows,
                          finish_.addend ? finish_.addend + at : nullptr,
                          apart_ ? results : finish_.y ? finish_.y + at : nullptr,
                          apart_ ? first_.rows : outputs,
                          finish_.low,
                          finish_.high,
                          &finish_.rounding,
                          to ? to->kind : InputKind::kUnsigned8,
                          places,
                          first,
                          first_.rows,
                          to && group + 1 == g_.groups ? to->pitch - first : first_.rows};
      const InputRows in{rows, inputs, shift, offsets_.data(), scales};
      const PackedWeight& packed = *conv_.weights_[group];
      const Panels& panels = unpacked_.groups[group].panels();
      if (packed.kernels().panels->run(panels, in, ending, first_unit, last_unit)) unknown_ = true;
      if (!apart_) continue;
      const int from = panels.first_block(first_unit) * kBlockRows;
      const int last = std::min(first_.rows, panels.first_block(last_unit) * kBlockRows);
      finish_apart({results + from, first_.rows, false, start, rows, first + from, first + last}, results + from);
    }
  }

  // Finishes results that were not finished in registers.
  void finish_apart(const Results& given, float* results) {
    const int outputs = first_.rows * g_.groups;
    if (finish_.activation)
      for (int row = 0; row < given.rows; ++row) {
        float* of_row = results + row * given.stride;
        kernels().rows->unary(*finish_.activation, of_row, given.last - given.first, of_row);
      }
    if (finish_.planar)
      store_planar(given, places_, outputs, finish_.y);
    else if (finish_some(*kernels().codes, finish_, places_, outputs, given))
      unknown_ = true;
  }

  const Conv& conv_;
  const ConvGeometry& g_;
  const Weight& first_;  // the others have its layout
  const Unpacked& unpacked_;
  const Run& run_;
  const Image& image_;
  const Finish& finish_;
  const Extent padded_, places_;
  const float unit_;
  const std::vector<float> biases_;
  const bool apart_;  // results are not finished in registers
  std::vector<int32_t> offsets_;  // of the words, from the first input of a row
  std::atomic<bool> unknown_{false};
};

bool Conv::run_panels(const Run& run, const Image& image, const Finish& finish, bool* known) const {
  if (volume(geometry_.output(run.size)) * run.batch <= kFewRows) return false;
  const Unpacked* made = unpacked(image.pitch);
  if (!made) return false;
  PanelProduct product(*this, *made, run, image, finish);
  if (!product.prepare()) return false;
  *known = product.all();
  return true;
}

}  // namespace dybit
