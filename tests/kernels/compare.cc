// Compares every instruction set of this machine with the scalar one, bit for bit. It needs neither Python nor torch
// and also runs under emulation. Arguments: the sets that must be present besides the scalar one. The last line of
// output is a hash of the scalar results, which is the same on every architecture.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "attention.h"
#include "codes.h"
#include "conv.h"
#include "conv_transposed.h"
#include "depthwise.h"
#include "dispatch.h"
#include "elementwise.h"
#include "kv_cache.h"
#include "norm.h"
#include "packed_weight.h"
#include "pooling.h"
#include "recurrent.h"
#include "row_kernels.h"

using namespace dybit;

namespace {

constexpr int kTimes = 4;  // how often random cases are drawn

uint32_t state = 1;
uint32_t draw() { return (state = state * 1664525u + 1013904223u) >> 8; }
int below(int count) { return int(draw() % uint32_t(count)); }
int between(int low, int high) { return low + below(high - low + 1); }
float uniform() { return float(draw()) / float(1 << 23) - 1.0f; }  // from -1 to 1, both not reached
template <class T>
T one_of(std::initializer_list<T> list) {
  return list.begin()[below(int(list.size()))];
}

// With ties, zeros and very small and large ones among them.
std::vector<float> numbers(int64_t count, bool finite = true) {
  std::vector<float> x(count);
  const float size = one_of({0.01f, 1.0f, 3.0f, 100.0f});
  for (float& value : x) {
    value = uniform() * size;
    if (below(8) == 0) value = float(between(-40, 40)) / 8;  // ties
    if (below(40) == 0) value = one_of({0.0f, -0.0f, 1e-41f, -1e-38f, 1e30f, -1e30f});
    if (!finite && below(40) == 0) value = one_of({INFINITY, -INFINITY, float(NAN)});
  }
  return x;
}

// NaN's sign depends on the instruction set.
std::vector<float> with_one_nan(std::vector<float> x) {
  for (float& value : x) value = value == value ? value : NAN;
  return x;
}

int64_t comparisons = 0, failures = 0;
uint64_t hash = 14695981039346656037ull;

template <class T>
void add_to_hash(const std::vector<T>& numbers) {
  for (T number : numbers) {
    if constexpr (std::is_floating_point_v<T>)
      if (number != number) number = 0;  // NaN's sign depends on the architecture
    uint8_t bytes[sizeof(T)];
    std::memcpy(bytes, &number, sizeof(T));
    for (uint8_t byte : bytes) hash = (hash ^ byte) * 1099511628211ull;
  }
}

// Calls f(kernels) → a vector of plain numbers for every set.
template <class F>
void compare(const std::string& what, F&& f) {
  const uint32_t before = state;
  const auto expected = f(kScalar);
  using T = typename std::decay_t<decltype(expected)>::value_type;
  add_to_hash(expected);
  const uint32_t after = state;
  for (const Kernels* set : available()) {
    if (set == &kScalar) continue;
    state = before;
    const auto found = f(*set);
    ++comparisons;
    auto same_bits = [](const T& a, const T& b) { return !std::memcmp(&a, &b, sizeof(T)); };
    if (std::equal(found.begin(), found.end(), expected.begin(), expected.end(), same_bits)) continue;
    if (++failures > 20) continue;
    size_t i = 0, differ = 0;
    for (size_t j = std::min(found.size(), expected.size()); j-- > 0;)
      if (!same_bits(found[j], expected[j])) i = j, ++differ;
    std::printf("%s: %s: %zu of %zu differ, the first at %zu: %.9g, not %.9g\n", set->name, what.c_str(), differ,
                found.size(), i, double(found[i]), double(expected[i]));
  }
  state = after;
}

struct WeightCase {
  int bits, rows, columns, group, books, largest;
  enum Form { kRandom, kExtreme, kRun } form;
  bool choose;
  std::vector<uint8_t> packed, choice;
  std::vector<float> scale, steps;
  std::vector<int32_t> table;

  WeightCase(int bits, int rows, int columns, int group, int largest, Form form)
      : bits(bits), rows(rows), columns(columns), group(group), books(between(1, 3)), largest(largest), form(form) {
    const int groups = (columns + group - 1) / group, count = books << bits;
    table.resize(count);
    for (int i = 0; i < count; ++i) {
      table[i] = between(-largest, largest);
      if (form == kExtreme) table[i] = below(4) ? largest : -largest;
      if (form == kRun) {
        const int run = i / 16, step = between(-100, 100);
        const int start = run == 3 ? 0 : between(-largest, largest);
        for (int l = 0; l < 16 && i + l < count; ++l)
          table[i + l] = (bits < 8 ? run % 8 : run % 16) % 7 == 3 ? between(-largest, largest) : start + l * step;
        i += 15;
      }
    }
    table[0] = largest;
    packed.resize(size_t(rows) * groups * (group + 8));
    for (auto& byte : packed) byte = uint8_t(draw());
    choose = books > 1;
    choice.resize(size_t(rows) * groups);
    for (auto& book : choice) book = uint8_t(below(books));
    scale = numbers(int64_t(rows) * groups);
    for (auto& value : scale) value = std::min(std::fabs(value) + 0.001f, 100.0f);
    steps.assign(books, 0.25f);
  }

  Portable portable() const {
    const uint8_t* choices = choose ? choice.data() : nullptr;
    return {packed.data(), rows, columns, bits, group,        scale.data(), true,
            true,          choices, true, true, table.data(), steps.data(), books};
  }
};

const InputFormat kInputs[] = {{false, 0, 0, false, 0}, {true, 7, 1, true, 0},  {true, 3, 3, true, 0},
                               {true, 7, 7, true, 0},   {true, 7, 2, true, 0},  {true, 8, 1, false, 0},
                               {true, 4, 2, false, 0},  {true, 7, 1, false, 0}, {true, 8, 8, false, 0}};

void linear_case(const WeightCase& w, InputFormat input, int rows, bool grouped, bool extreme) {
  input.group_size = grouped ? std::max(1, w.columns / 3) : w.columns;
  std::vector<float> x = numbers(int64_t(rows) * w.columns), bias = numbers(w.rows);
  if (extreme)
    for (float& value : x) value = input.quantized ? (below(8) ? 1e9f : -1e9f) : value;
  const float scale = 0.37f, offset = 0.11f;
  const bool fixed = extreme || (!grouped && below(3) == 0), moved = fixed && below(2), has_bias = below(2);
  const auto activation = Activation(std::max(0, between(1 - kActivations, kActivations - 1)));
  const std::string what = "linear, " + std::to_string(w.bits) + " bits up to " + std::to_string(w.largest) + ", " +
                           std::to_string(w.rows) + "x" + std::to_string(w.columns) + " in groups of " +
                           std::to_string(w.group) + ", " + std::to_string(rows) + " rows, inputs of " +
                           std::to_string(input.magnitude_bits) + " bits, runs up to " + std::to_string(input.max_run) +
                           (input.is_signed ? ", signed" : "") + ", activation " + std::to_string(int(activation));
  compare(what, [&](const Kernels& set) {
    const PackedWeight weight(w.portable(), input, set);
    std::vector<float> y(size_t(rows) * w.rows, -1.0f);
    weight.linear(x.data(), rows, y.data(), has_bias ? bias.data() : nullptr, fixed ? &scale : nullptr,
                  moved ? &offset : nullptr, 1.5f, 1 + rows % 2, activation);
    y.push_back(float(int(weight.weight().storage)));
    return y;
  });
}

void linears() {
  struct Kind {
    int bits, largest;
    WeightCase::Form form;
  };
  constexpr auto kRandom = WeightCase::kRandom, kExtreme = WeightCase::kExtreme, kRun = WeightCase::kRun;
  const Kind kinds[] = {{2, 3, kRandom},     {2, 127, kExtreme}, {3, 16, kRandom},     {3, 127, kRandom},
                        {4, 16, kRandom},    {4, 64, kExtreme},  {4, 65, kExtreme},    {4, 127, kExtreme},
                        {4, 300, kRandom},   {5, 127, kRandom},  {6, 127, kExtreme},   {8, 127, kRandom},
                        {8, 60, kExtreme},   {7, 8000, kRun},    {8, 8000, kRun},      {8, 8192, kExtreme},
                        {7, 32767, kRandom}, {8, 32767, kExtreme}};
  for (const Kind& kind : kinds)
    for (const InputFormat& input : kInputs)
      for (int i = 0; i < 10 * kTimes; ++i) {
        const int columns = one_of({1, 5, 31, 32, 33, 77, 128, 130, 257}), rows = one_of({1, 3, 4, 7, 8, 13, 16, 17, 37});
        const int group = below(2) ? columns : one_of({8, 32, 40, 64});
        const WeightCase w(kind.bits, rows, columns, group, kind.largest, kind.form);
        const int inputs = i % 10 < 9 ? i % 10 + 1 : between(10, 20);
        const bool grouped = below(3) == 0;
        linear_case(w, input, inputs, grouped, kind.form == WeightCase::kExtreme);
      }
  // Rows that take several segments, and several panels.
  for (int i = 0; i < 2 * kTimes; ++i)
    for (const Kind& kind : {kinds[4], kinds[11], kinds[16]})
      for (const InputFormat& input : {kInputs[1], kInputs[3], kInputs[5]})
        linear_case(WeightCase(kind.bits, 17, 9000, 9000, kind.largest, kind.form), input, i % 2 ? 1 : 5, false, false);
  for (const Kind& kind : kinds) {
    const WeightCase w(kind.bits, 37, 77, 32, kind.largest, kind.form);
    compare("dequantize, " + std::to_string(kind.bits) + " bits", [&](const Kernels& set) {
      std::vector<float> out(size_t(w.rows) * w.columns);
      PackedWeight(w.portable(), kInputs[0], set).dequantize(out.data(), 1);
      return out;
    });
  }
}

Codebook random_book(int count) {
  std::vector<float> boundaries = numbers(count - 1), values = numbers(count);
  std::sort(boundaries.begin(), boundaries.end());
  std::sort(values.begin(), values.end());
  std::vector<uint8_t> codes(count);
  for (auto& code : codes) code = uint8_t(draw());
  return Codebook(boundaries.data(), values.data(), codes.data(), count);
}

void codes() {
  for (int i = 0; i < 300 * kTimes; ++i) {
    const int levels = i % 3 ? 1 << (1 + i % 8) : between(2, 256), count = below(4) ? below(50) : between(1000, 2100);
    const Codebook book = random_book(levels);
    const std::string what = std::to_string(levels) + " levels, " + std::to_string(count) + " elements";
    std::vector<float> x = numbers(count, false), finite = numbers(count), weights = numbers(count);
    for (auto& value : weights) value = std::fabs(value);
    const float step = one_of({1.0f, 0.3f, 1e-39f, 1e38f, 7.0f}), offset = uniform();
    for (auto& value : x)  // on a boundary
      if (below(5) == 0) value = book.tree[below((1 << book.steps) - 1)] * step;
    const bool moved = below(2), weighted = below(2);
    compare("round, " + what, [&](const Kernels& set) {
      std::vector<float> out(count);
      set.codes->round(book, x.data(), count, step, moved ? &offset : nullptr, out.data());
      return out;
    });
    compare("encode, " + what, [&](const Kernels& set) {
      std::vector<uint8_t> out(count);
      set.codes->encode(book, x.data(), count, step, out.data());
      return out;
    });
    compare("largest, " + what, [&](const Kernels& set) {
      return std::vector<uint32_t>{set.codes->largest(x.data(), count)};
    });
    compare("fit, " + what, [&](const Kernels& set) {
      const Fit fit = set.codes->fit(book, finite.data(), weighted ? weights.data() : nullptr, count, step);
      return std::vector<double>{fit.error, fit.cross, fit.square};
    });
    compare("pass, " + what, [&](const Kernels& set) {
      std::vector<float> kept(count);
      const float low = book.values[0], high = book.values[kMaxLevels - 1];
      const double slope =
          set.codes->pass(finite.data(), weights.data(), finite.data(), count, step, low, high, kept.data());
      kept.push_back(float(slope));
      return kept;
    });
    const int bits = 1 + i % 8;
    std::vector<uint8_t> indices(count);
    for (auto& index : indices) index = uint8_t(below(1 << bits));
    const std::vector<float> table = numbers(1 << bits, false);
    compare("lookup, " + std::to_string(bits) + " bits", [&](const Kernels& set) {
      std::vector<float> out(count);
      set.codes->lookup(table.data(), bits, indices.data(), count, step, out.data());
      for (float& value : out) value = value == value ? value : NAN;
      return out;
    });
    std::vector<float> small(count);
    for (auto& value : small) value = below(10) ? uniform() : one_of({1.0f, -1.0f, 0.0f, -0.0f});
    compare("cells", [&](const Kernels& set) {
      std::vector<uint16_t> out(count);
      set.codes->cells(small.data(), count, one_of({64, 256, 1024}), out.data());
      return out;
    });
  }
  for (int units = 1; units <= kMixUnits; ++units) {
    const int cells = 70;
    const std::vector<float> histogram = numbers(units * cells), table = numbers(cells * kMixColumns);
    compare("mix of " + std::to_string(units), [&](const Kernels& set) {
      std::vector<float> sums(units * kMixColumns);
      const float* from[kMixUnits];
      float* to[kMixUnits];
      for (int u = 0; u < units; ++u) from[u] = histogram.data() + u * cells, to[u] = sums.data() + u * kMixColumns;
      set.codes->mix(from, units, table.data(), cells, to);
      return sums;
    });
    const std::vector<uint16_t> list{3, 4, 17, 69};
    compare("mix_few", [&](const Kernels& set) {
      std::vector<float> sums(kMixColumns);
      set.codes->mix_few(histogram.data(), list.data(), 4, table.data(), sums.data());
      return sums;
    });
  }
}

// The kinds that hold the significands of a format.
std::vector<InputKind> kinds_of(const Rounding& r) {
  const int most = max_significand(r.magnitude_bits, r.max_run);
  std::vector<InputKind> kinds;
  if (most <= 127) kinds.push_back(InputKind::kSigned8);
  if (most <= 255 && !r.is_signed) kinds.push_back(InputKind::kUnsigned8);
  if (most <= 32767) kinds.push_back(InputKind::kSigned16);
  return kinds;
}

void roundings() {
  for (int m = 1; m <= 8; ++m)
    for (int r = 1; r <= m; ++r)
      for (bool is_signed : {false, true}) {
        const Rounding rounding{m, r, is_signed, false, 1.0f, one_of({1.0f, 0.5f, 0.3f, 0.01f}),
                                below(3) ? 0.0f : uniform()};
        const std::vector<InputKind> kinds = kinds_of(rounding);
        const int count = between(1, 300);
        const std::vector<float> x = numbers(count, false), finite = numbers(count);
        for (InputKind kind : kinds) {
          compare("finish", [&](const Kernels& set) {
            const int channels = between(1, 40), padded = channels + below(40), rows = between(1, 4);
            const int stride = channels + below(3), from_stride = (channels + 15) / 16 * 16;
            const bool more = below(2), adds = below(2), nan = below(8) == 0;
            std::vector<float> from = numbers(rows * from_stride), addend = numbers(rows * stride), y(rows * stride);
            for (float& value : from)
              if (below(4) == 0) value = std::ldexp(float(between(-300, 300)) + 0.5f, 1 - m) * rounding.scale;  // ties
            for (int row = 0; row < rows; ++row)
              for (int c = channels; c < from_stride; ++c) from[row * from_stride + c] = 0;
            if (nan) from[below(channels)] = NAN;
            std::vector<uint8_t> image(rows * padded * element_bytes(kind), 99);
            std::vector<uint8_t*> images;
            for (int row = 0; row < rows; ++row) images.push_back(image.data() + row * padded * element_bytes(kind));
            const FinishTask task{from.data(), from_stride, bool(below(2)), adds ? addend.data() : nullptr,
                                  more ? y.data() : nullptr, stride, below(2) ? -INFINITY : 0.0f,
                                  below(2) ? INFINITY : 2.0f, &rounding, kind, images.data(), channels, padded};
            const bool unknown = set.codes->finish(task, rows);
            if (nan) return std::vector<uint8_t>{unknown};  // significands of NaN may be any
            std::vector<uint8_t> result = image;
            result.push_back(unknown);
            const auto* bytes = reinterpret_cast<const uint8_t*>(y.data());
            result.insert(result.end(), bytes, bytes + y.size() * sizeof(float));
            return result;
          });
          auto significands = [&](const Kernels& set, const std::vector<float>& from) {
            std::vector<uint8_t> out(count * element_bytes(kind) + 1);
            uint8_t* const to = out.data();
            const FinishTask task{from.data(), count,    false,     nullptr, nullptr, 0,    -INFINITY,
                                  INFINITY,    &rounding, kind, &to,     count,   count};
            out.back() = set.codes->finish(task, 1);
            if (out.back()) return std::vector<uint8_t>{1};  // significands of NaN may be any
            return out;
          };
          for (InputKind to : {InputKind::kSigned16, InputKind::kFloat})
            compare("convert", [&](const Kernels& set) {
              const std::vector<uint8_t> some = significands(set, finite);
              std::vector<uint8_t> out(count * element_bytes(to));
              set.codes->convert(kind, some.data(), count, to, out.data());
              return out;
            });
          for (const auto* source : {&x, &finite})
            compare("significands of " + std::to_string(m) + " bits, runs up to " + std::to_string(r),
                    [&](const Kernels& set) { return significands(set, *source); });
        }
      }
}

void gathers() {
  for (int i = 0; i < 60 * kTimes; ++i) {
    const int segments = between(1, 3), rows = between(1, 5), bytes = i % 2 ? 1 : 2;
    std::vector<Segment> cut;
    std::vector<GatherRun> runs;
    int chunk = 0, start = 0;
    for (int s = 0; s < segments; ++s) {
      const int length = between(1, 150), chunks = (length + kChunk - 1) / kChunk;
      cut.push_back({start, length, chunk, chunks, s, s});
      const int half = below(length);
      if (half) runs.push_back({chunk * kChunk * bytes, below(500), half * bytes});
      runs.push_back({(chunk * kChunk + half) * bytes, below(500), (length - half) * bytes});
      start += length;
      chunk += chunks;
    }
    const size_t row_bytes = size_t(chunk) * kChunk * bytes;
    std::vector<uint8_t> image(2000);
    for (auto& byte : image) byte = below(4) ? uint8_t(draw()) : one_of({uint8_t(127), uint8_t(128)});
    std::vector<int64_t> origins(rows);
    for (auto& origin : origins) origin = below(500);
    const GatherTask task{image.data(), runs.data(), int(runs.size()), cut.data(), segments, bytes, row_bytes};
    compare("gather", [&](const Kernels& set) {
      std::vector<int32_t> sums(rows * segments);
      std::vector<uint8_t> out(row_bytes * rows, 99);
      set.codes->gather(task, origins.data(), rows, out.data(), bytes == 1 ? sums.data() : nullptr);
      std::vector<int32_t> result(out.begin(), out.end());
      result.insert(result.end(), sums.begin(), sums.end());
      if (bytes == 1) {  // rows as they lie
        set.codes->gather(task, origins.data(), rows, nullptr, sums.data());
        result.insert(result.end(), sums.begin(), sums.begin() + rows);
      }
      return result;
    });
  }
}

void convolutions() {
  for (int i = 0; i < 120 * kTimes; ++i) {
    const bool depthwise = i % 3 == 2;
    const int groups = depthwise ? 1 : between(1, 2), channels = groups * one_of({1, 3, 8, 16, 32, 37});
    const int outputs = one_of({1, 5, 16, 33, 64, 70, 150}), batch = between(1, 2);
    const bool flat = below(2);  // one or two dimensions
    const Extent size{flat ? 1 : between(3, 5), between(4, 9), between(4, 9)};
    const Extent kernel{flat ? 1 : between(1, 3), one_of({1, 3}), one_of({1, 3})};
    const Extent stride{between(1, 2), between(1, 2), between(1, 2)};
    const Extent dilation{1, 1, kernel[2] == 3 && below(3) == 0 ? 2 : 1};
    const Extent before{kernel[0] / 2, kernel[1] / 2, kernel[2] / 2};
    const ConvGeometry geometry{kernel, stride, dilation, before, before, channels, depthwise ? channels : groups,
                                !depthwise && below(4) == 0};
    const InputFormat formats[] = {kInputs[1], kInputs[5], kInputs[3], kInputs[6]};
    InputFormat format = formats[below(4)];
    const int taps = int(volume(kernel)), columns = taps * channels / groups;
    format.group_size = columns;
    std::vector<WeightCase> weights;
    const int largest = one_of({16, 16, 16, 60, 127, 5000});
    const int group = below(3) ? columns : one_of({8, 32, 40});  // several segments
    for (int g = 0; g < groups; ++g)
      weights.emplace_back(4, outputs, columns, group, largest, WeightCase::kRandom);
    std::vector<float> x = numbers(batch * volume(size) * channels);
    for (float& value : x) value = std::clamp(value, -5.0f, 5.0f);
    const int all = depthwise ? channels : outputs * groups;
    std::vector<float> bias = numbers(all), scales(channels), significands(taps * channels);
    for (auto& value : scales) value = std::fabs(uniform());
    // Weights of bytes, or of 16 bits; sums stay below 2^24.
    const int most = int(16777215.0f / (format.top() * format.unit() * float(taps)));
    const int widest = std::min(most, one_of({16, 127, 252}));
    for (auto& value : significands) value = float(between(-widest, widest));
    const Extent places = geometry.output(size);
    const int64_t count = batch * volume(places) * all;
    const float scale_of_inputs = 0.04f;
    const bool fixed = below(2), fused = below(3), stores = below(2), adds = below(2);
    const int pitch = channels + below(3), result_pitch = below(2) ? all + 5 : (all + 31) / 32 * 32;
    const Extent wider{before[0] + below(2), before[1] + below(2), before[2] + below(2)};
    // Levels that are integers, that are not, and a scale for which results are divided.
    const Rounding ends[] = {{8, 1, false, false, 1.0f, 0.05f, 0.0f},  {7, 1, true, false, 1.0f, 0.2f, 0.0f},
                             {7, 1, true, false, 1.0f, 0.2f, 0.7f},    {5, 2, true, false, 1.0f, 2.0f, 0.0f},
                             {7, 7, true, false, 1.0f, 2.0f, 0.0f},    {8, 1, false, false, 1.0f, 1e-33f, 0.0f}};
    const Rounding end = ends[below(6)];
    const InputKind to = kinds_of(end)[0];
    const float low = one_of({-INFINITY, 0.0f, -1.0f, 0.5f}), high = one_of({INFINITY, 6.0f, 1.0f});
    const std::vector<float> addend = numbers(count);
    const bool planar = below(2);
    const std::string what = (depthwise ? "depthwise of " : "conv of ") + std::to_string(channels) + " channels";
    compare(what, [&](const Kernels& set) {
      use(set.name);
      std::vector<float> y(count);
      const ConvInput input{x.data(), batch, size, fixed ? &scale_of_inputs : nullptr, nullptr, 3.0f,
                            planar};
      // The inputs as an image; results likewise.
      std::vector<PackedWeight> held;
      std::vector<const PackedWeight*> pointers;
      held.reserve(groups);
      for (const WeightCase& w : weights) pointers.push_back(&held.emplace_back(w.portable(), format, set));
      const InputKind kind = held[0].kind();
      const int64_t pixels = batch * volume(padded_by(wider, size, before));
      std::vector<uint8_t> data(element_bytes(kind) * pixels * pitch);
      std::vector<uint8_t> results(element_bytes(to) * batch * volume(places) * result_pitch, 99);
      const Image image{data.data(), kind, wider, before, channels, pitch};
      const Image result{results.data(), to, {}, {}, all, result_pitch};
      const Rounding rounding{format.magnitude_bits, format.max_run, format.is_signed, false, 1.0f,
                              scale_of_inputs,       0.0f};
      const Finish finish{stores ? y.data() : nullptr, adds ? addend.data() : nullptr, low, high, &result, end};
      bool good = !fused || round_to_image(x.data(), batch, size, &rounding, false, image, 1);
      auto run = [&](const auto& conv) {
        if (fused)
          good &= conv.run(image, batch, size, scale_of_inputs, nullptr, bias.data(), finish, 1);
        else
          good &= conv.run(input, y.data(), bias.data(), 1);
      };
      if (depthwise) {
        run(Depthwise(significands.data(), scales.data(), geometry, format));
      } else {
        run(Conv(pointers, geometry));
      }
      std::vector<uint8_t> found = results;
      const auto* bytes = reinterpret_cast<const uint8_t*>(y.data());
      found.insert(found.end(), bytes, bytes + y.size() * sizeof(float));
      found.push_back(good);
      return found;
    });
  }
}

// Levels of a width that is held as a table, or as steps of 1, 2 and 4.
CacheFormat cache_format(int bits) {
  if (bits > 8) return CacheFormat(bits, {}, {}, false);
  std::vector<std::vector<float>> books(bits > 4 ? 1 : between(1, 4));
  for (size_t book = 0; book < books.size(); ++book)
    for (int i = 0; i < 1 << bits; ++i) {
      const float t = float(i) - float((1 << bits) - 1) / 2, half = float(1 << (bits - 2));
      const float inner = std::min(std::max(t, -half), half);
      books[book].push_back(t + (bits > 4 ? 1.0f : float(book) / 2) * (t - inner));
    }
  return CacheFormat(bits, books, bits > 4 ? std::vector<float>{1} : std::vector<float>{1, 0.9f}, below(2));
}

void caches() {
  for (int bits : {2, 3, 4, 5, 6, 7, 8, 16, 32})
    for (int time = 0; time < 2 * kTimes; ++time) {
      const CacheShape shape{between(1, 2), one_of({1, 16, 24, 64}), one_of({1, 16, 40, 64})};
      const CacheOptions options{cache_format(bits),        cache_format(bits), one_of({16, 32, 64}),
                                 one_of({16, 32, 64, 128}), below(40),          below(2) == 1,
                                 below(2) == 1};
      const int tokens = between(1, 150), group = between(1, 4), queries = between(1, std::min(tokens, 12));
      const auto keys = numbers(int64_t(tokens) * shape.kv_heads * shape.key_size, below(4) > 0);
      const auto values = numbers(int64_t(tokens) * shape.kv_heads * shape.value_size, below(4) > 0);
      const auto q = numbers(int64_t(queries) * shape.kv_heads * group * shape.key_size);
      const CacheAttention attention{shape.kv_heads * group, 0.3f, below(2) * 20, float(below(2) * 5)};
      compare("cache of " + std::to_string(bits) + " bits", [&](const Kernels& set) {
        use(set.name);
        KVCache cache(shape, options);
        cache.reset(1);
        const CacheRows rows{0, tokens, keys.data(), values.data(),
                             {shape.key_size, int64_t(shape.kv_heads) * shape.key_size},
                             {shape.value_size, int64_t(shape.kv_heads) * shape.value_size}};
        cache.append(&rows, 1, 1);
        std::vector<float> result(int64_t(queries) * shape.kv_heads * group * shape.value_size + keys.size() +
                                  values.size());
        CacheQueries asked{0, queries, below(3), q.data(), {}, result.data(), {}};
        asked.q_strides[0] = shape.key_size, asked.q_strides[1] = int64_t(attention.heads) * shape.key_size;
        asked.out_strides[0] = shape.value_size, asked.out_strides[1] = int64_t(attention.heads) * shape.value_size;
        cache.attend(&asked, 1, attention, between(1, 2));
        float* all = result.data() + result.size() - keys.size() - values.size();
        cache.read(0, all, all + keys.size());
        return with_one_nan(result);
      });
    }
}

void attentions() {
  for (int i = 0; i < 60 * kTimes; ++i) {
    AttentionTask task{};
    task.batch = between(1, 2), task.kv_heads = between(1, 2), task.heads = task.kv_heads * one_of({1, 1, 3});
    task.queries = one_of({1, 2, 5, 25, 50}), task.keys = one_of({0, 1, 15, 16, 17, 65, 100, 300, 520});
    task.head_size = one_of({1, 16, 20, 32, 64}), task.value_size = one_of({1, 16, 33, 64, 80});
    task.scale = one_of({0.1f, 1.0f, -0.3f, 0.0f});
    task.causal = below(2), task.causal_offset = one_of({0, task.keys - task.queries, -3});
    const bool tame = below(4);
    auto heads = [&](int count, int tokens, int size, int64_t (&strides)[3]) {  // the heads of a token side by side
      strides[1] = size, strides[2] = count * size + below(3), strides[0] = tokens * strides[2];
      std::vector<float> x = numbers(task.batch * strides[0], tame);
      if (tame)
        for (float& value : x) value = std::clamp(value, -5.0f, 5.0f);
      return x;
    };
    const std::vector<float> q = heads(task.heads, task.queries, task.head_size, task.q_strides);
    const std::vector<float> k = heads(task.kv_heads, task.keys, task.head_size, task.k_strides);
    const std::vector<float> v = heads(task.kv_heads, task.keys, task.value_size, task.v_strides);
    std::vector<float> y = heads(task.heads, task.queries, task.value_size, task.out_strides);
    task.q = q.data(), task.k = k.data(), task.v = v.data(), task.out = y.data();
    // Masks of queries and keys.
    std::vector<float> mask = numbers(task.queries * task.keys);
    std::vector<uint8_t> seen(mask.size());
    for (size_t j = 0; j < mask.size(); ++j)
      if (!(seen[j] = below(4))) mask[j] = -INFINITY;
    task.mask_strides[2] = task.keys, task.mask_strides[3] = 1;
    if (below(3) == 0) task.mask_strides[2] = 1, task.mask_strides[3] = task.queries;
    const int masked_by = below(3);
    if (masked_by == 1) task.mask = mask.data();
    if (masked_by == 2) task.bool_mask = seen.data();
    const std::string what = "attention, " + std::to_string(task.queries) + " queries, " + std::to_string(task.keys) +
                             " keys of " + std::to_string(task.head_size);
    compare(what, [&](const Kernels& set) {
      use(set.name);
      attention(task, between(1, 2));
      return with_one_nan(y);
    });
  }
}

void norms() {
  for (int i = 0; i < 30 * kTimes; ++i) {
    const int rows = between(1, 5), columns = one_of({1, 15, 16, 17, 100, 384, 1000}), stride = columns + below(3);
    const std::vector<float> x = numbers(rows * stride, below(4)), addend = numbers(rows * stride);
    const std::vector<float> weight = numbers(columns), bias = numbers(columns);
    std::vector<float> sum(rows * stride), y(rows * stride);
    const NormTask task{x.data(), stride, below(2) ? addend.data() : nullptr, stride, sum.data(), stride,
                        below(2) ? weight.data() : nullptr, below(2) ? bias.data() : nullptr, 1e-5f, bool(below(2)),
                        float(below(2)), columns, y.data(), stride};
    compare("norm of " + std::to_string(columns), [&](const Kernels& set) {
      use(set.name);
      norm(task, nullptr, {}, nullptr, rows, 1);
      std::vector<float> found = y;
      found.insert(found.end(), sum.begin(), sum.end());
      return with_one_nan(found);
    });
  }
}

void elementwise() {
  for (int i = 0; i < 10 * kTimes; ++i) {
    const int rows = between(1, 4), columns = one_of({1, 7, 16, 33, 1100});
    const int64_t count = int64_t(rows) * columns;
    const std::vector<float> a = numbers(count, below(4)), b = numbers(count, below(4));
    std::vector<float> y(count);
    auto check = [&](const std::string& what, auto&& run) {
      compare(what + " of " + std::to_string(columns), [&](const Kernels& set) {
        use(set.name);
        run();
        return with_one_nan(y);
      });
    };
    for (int kind = 0; kind < kUnaries; ++kind)
      check("unary " + std::to_string(kind), [&] { unary(Unary(kind), a.data(), count, y.data(), 1); });
    const std::array<int64_t, 3> whole{0, columns, 1}, row{0, 0, 1}, column{0, columns, 0};
    for (int kind = 0; kind < kBinaries; ++kind)
      check("binary " + std::to_string(kind), [&] {
        const Operand first{a.data(), one_of({whole, column})}, second{b.data(), one_of({whole, row, column})};
        binary(Binary(kind), {1, rows, columns}, first, second, y.data(), whole, 1);
      });
    check("clamp", [&] { clamp(a.data(), count, -1.0f, 2.0f, y.data(), 1); });
    check("softmax", [&] { softmax(a.data(), rows, columns, y.data(), 1); });
  }
}

void poolings() {
  for (int i = 0; i < 10 * kTimes; ++i) {
    const int channels = one_of({1, 15, 16, 70, 130}), side = between(3, 9), out = (side - 1) / 2 + 1;
    const std::vector<float> x = numbers(int64_t(side) * side * channels, below(4));
    std::vector<float> y(size_t(out) * out * channels);
    const PoolTask task{1, channels, {side, side}, {out, out}, x.data(), {0, int64_t(side) * channels, channels},
                        y.data(), {0, int64_t(out) * channels, channels}};
    const PoolWindow window{{3, 3}, {2, 2}, {1, 1}, {1, 1}};
    const bool count_include_pad = below(2);
    const int divisor = below(2);
    for (int kind = 0; kind < 3; ++kind)
      compare("pooling " + std::to_string(kind) + " of " + std::to_string(channels), [&](const Kernels& set) {
        use(set.name);
        if (kind == 0) max_pool(task, window, 1);
        if (kind == 1) average_pool(task, window, count_include_pad, divisor, 1);
        if (kind == 2) adaptive_average_pool(task, 1);
        return with_one_nan(y);
      });
  }
}

void layers() {
  for (int i = 0; i < 20 * kTimes; ++i) {
    // Runs of values, up to two of them irregular.
    std::vector<float> table(256);
    for (int h = 0; h < 16; ++h) {
      const float start = float(between(-50, 50)), step = one_of({0.0f, 1.0f, -4.0f, 0.25f});
      for (int l = 0; l < 16; ++l) table[16 * h + l] = h % 8 == 7 && i % 2 ? uniform() : start + float(l) * step;
    }
    ValueRuns runs;
    std::vector<uint8_t> indices(one_of({1, 15, 16, 255, 256, 700}));
    for (auto& index : indices) index = uint8_t(draw());
    if (!runs.take(table.data())) std::printf("a table is no runs\n"), ++failures;
    compare("runs of values", [&](const Kernels& set) {
      std::vector<float> out(indices.size());
      set.codes->lookup_runs(runs, indices.data(), int64_t(indices.size()), 0.3f, out.data());
      return out;
    });
    const int rows = between(1, 40), columns = between(1, 40);
    const std::vector<float> matrix = numbers(rows * columns);
    compare("transpose", [&](const Kernels& set) {
      std::vector<float> out(matrix.size());
      set.rows->transpose(matrix.data(), columns, rows, columns, out.data(), rows);
      return out;
    });
    InputFormat format = kInputs[between(1, 5)];
    const int size = between(1, 40), steps = between(1, 4), batch = between(1, 3);
    const int gates = i % 3 == 0 ? 4 : i % 3 == 1 ? 3 : 1;
    const WeightCase weight(4, gates * size, size, size, 7, WeightCase::kRandom);
    format.group_size = size;
    const std::vector<float> x = numbers(int64_t(steps) * batch * gates * size), first = numbers(batch * size);
    const std::vector<int64_t> counts(steps, batch);
    const bool reverse = below(2);
    compare("recurrent", [&](const Kernels& set) {
      use(set.name);
      const PackedWeight packed(weight.portable(), format, set);
      std::vector<float> h = first, c = first, y(size_t(steps) * batch * size);
      const Cell cell = gates == 4 ? Cell::kLstm : gates == 3 ? Cell::kGru : Cell::kTanh;
      recur({cell, &packed, nullptr, {nullptr, nullptr, 1.5f}, steps, counts.data(), reverse, x.data(), h.data(),
             c.data(), y.data()},
            1);
      y.insert(y.end(), h.begin(), h.end());
      return with_one_nan(y);
    });
    const int channels = between(1, 20), outputs = between(1, 20);
    const ConvGeometry geometry{{1, between(1, 3), between(1, 3)}, {1, between(1, 2), between(1, 2)},
                                {1, between(1, 2), between(1, 2)}, {0, between(0, 1), between(0, 1)}, {}, channels, 1,
                                false};
    const int taps = int(volume(geometry.kernel));
    const WeightCase kernel(4, taps * outputs, channels, channels, 7, WeightCase::kRandom);
    const std::vector<float> image = numbers(2 * 20 * channels);
    const bool planar = below(2);
    format.group_size = channels;
    compare("transposed convolution", [&](const Kernels& set) {
      use(set.name);
      const PackedWeight packed(kernel.portable(), format, set);
      const float scale = 0.3f;
      std::vector<float> y(2 * 77 * outputs);
      const ConvTransposed conv({&packed}, geometry);
      if (!conv.run({image.data(), 2, {1, 4, 5}, &scale, nullptr, 1.0f, planar}, {1, 7, 11}, y.data(), nullptr, 1))
        y.assign(1, NAN);
      return with_one_nan(y);
    });
  }
}

}  // namespace

int main(int count, char** names) {
  std::string sets;
  for (const Kernels* set : available()) sets += std::string(" ") + set->name;
  std::printf("sets that are here and passed their test at load:%s\n", sets.c_str());
  for (int i = 1; i < count; ++i)
    if (std::none_of(available().begin(), available().end(),
                     [&](const Kernels* set) { return !std::strcmp(set->name, names[i]); })) {
      std::printf("%s is missing\n", names[i]);
      return 1;
    }
  linears();
  codes();
  for (int i = 0; i < kTimes; ++i) roundings();
  gathers();
  convolutions();
  attentions();
  caches();
  norms();
  elementwise();
  poolings();
  layers();
  std::printf("%lld comparisons, %lld failures\nscalar results: %016llx\n", (long long)comparisons, (long long)failures,
              (unsigned long long)hash);
  return failures != 0;
}
