#include "codes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "coded_table.h"
#include "dispatch.h"
#include "pool.h"

namespace dybit {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements that one thread takes at a time
constexpr int64_t kBuffer = 256;     // a multiple of 16 and of 8 codes

const CodeKernels& code_kernels() { return *kernels().codes; }

// Calls work(first, last) for pieces of `count` rows of `length` elements.
template <class F>
void by_rows(int64_t count, int64_t length, int threads, F&& work) {
  const int64_t step = std::max<int64_t>(1, kPiece / std::max<int64_t>(1, length));
  parallel_for(int((count + step - 1) / step), count * length < 4 * kPiece ? 1 : threads,
               [&](int i) { work(i * step, std::min(count, (i + 1) * step)); });
}

float widen(uint16_t half) { return std::bit_cast<float>(uint32_t(half) << 16); }

uint16_t narrow(float x) {  // to bfloat16, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(0x7fc0);
  return uint16_t(rounded - ((rounded & 0x7fff) == 0x7f80 && (bits & 0x7fffffffu) < 0x7f800000u));  // not to infinity
}

// Calls work(x, out, count) on FP32 elements; bfloat16 goes through a buffer.
template <class F>
void as_float(const void* x, void* out, bool half, int64_t start, int64_t count, F&& work) {
  if (!half) return work(static_cast<const float*>(x) + start, static_cast<float*>(out) + start, count);
  const uint16_t* from = static_cast<const uint16_t*>(x) + start;
  uint16_t* to = static_cast<uint16_t*>(out) + start;
  float buffer[kBuffer];
  for (int64_t i = 0; i < count; i += kBuffer) {
    const int64_t n = std::min(kBuffer, count - i);
    for (int64_t j = 0; j < n; ++j) buffer[j] = widen(from[i + j]);
    work(buffer, buffer, n);
    for (int64_t j = 0; j < n; ++j) to[i + j] = narrow(buffer[j]);
  }
}

void pack(const uint8_t* codes, int64_t count, int bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, codes, count);
    return;
  }
  for (int64_t i = 0; i < count; i += 8, out += bits) {
    const int n = int(std::min<int64_t>(8, count - i));
    uint64_t word = 0;
    for (int j = 0; j < n; ++j) word |= uint64_t(codes[i + j]) << (j * bits);
    for (int j = 0; j < (n * bits + 7) / 8; ++j) out[j] = uint8_t(word >> (8 * j));
  }
}

// `bytes` are there from `packed` on; count is a multiple of 8, or the end.
void unpack(const uint8_t* packed, int64_t bytes, int64_t count, int bits, uint8_t* codes) {
  if (bits == 8) {
    std::memcpy(codes, packed, count);
  } else if (bits == 4) {
    for (int64_t i = 0; i < count / 2; ++i) {
      codes[2 * i] = packed[i] & 15;
      codes[2 * i + 1] = packed[i] >> 4;
    }
    if (count % 2) codes[count - 1] = packed[count / 2] & 15;
  } else {
    const uint64_t mask = (uint64_t(1) << bits) - 1;
    for (int64_t i = 0; i < count; i += 8, packed += bits, bytes -= bits) {
      uint64_t word = 0;
      if (bytes >= 8)
        std::memcpy(&word, packed, 8);
      else
        std::memcpy(&word, packed, size_t(std::min<int64_t>(bytes, bits)));
      const int n = int(std::min<int64_t>(8, count - i));
      for (int j = 0; j < n; ++j) codes[i + j] = uint8_t(word >> (j * bits) & mask);
    }
  }
}

int64_t packed_size(int64_t count, int bits) { return (count * bits + 7) / 8; }

struct Range {
  int64_t start, length;
};

Range group_range(const Units& units, int64_t group) {
  const int64_t start = group * units.group;
  return {start, std::min(units.group, units.columns - start)};
}

// Calls work(row, group, start, length) for each unit, whose elements are contiguous.
template <class F>
void by_units(const Units& units, int threads, F&& work) {
  by_rows(units.rows, units.columns, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t group = 0; group < units.groups(); ++group) {
        const Range range = group_range(units, group);
        work(row, group, row * units.columns + range.start, range.length);
      }
  });
}

}  // namespace

float dynamic_scale(uint32_t largest, float reach, float top) {
  constexpr float kMost = 3.4e38f;  // below the largest float, so that a quotient times its divisor does not overflow
  const float value = std::bit_cast<float>(largest);
  if (!std::isfinite(value)) return std::numeric_limits<float>::quiet_NaN();
  return std::clamp(value / reach, std::numeric_limits<float>::min(), kMost / std::max(top, 1.0f));
}

Codebook::Codebook(const float* boundaries, const float* level_values, const uint8_t* level_codes, int count) {
  steps = std::max(1, int(std::bit_width(unsigned(count - 1))));
  for (int level = 0; level < steps; ++level)
    for (int node = 0; node < 1 << level; ++node) {
      // In order, the nodes of a level lie at odd multiples of a power of two.
      const int rank = (2 * node + 1) * (1 << (steps - 1 - level)) - 1;
      tree[(1 << level) - 1 + node] = rank < count - 1 ? boundaries[rank] : std::numeric_limits<float>::infinity();
    }
  for (int i = (1 << steps) - 1; i < kMaxLevels; ++i) tree[i] = std::numeric_limits<float>::infinity();
  for (int i = 0; i < kMaxLevels; ++i) {
    values[i] = level_values[std::min(i, count - 1)];
    codes[i] = level_codes[std::min(i, count - 1)];
  }
  top = std::max(std::abs(level_values[0]), std::abs(level_values[count - 1]));
}

void round_units(const Codebook& book, const Units& units, const void* x, void* out, bool half, PerUnit<float> scale,
                 const float* offset, float reach, int threads) {
  const CodeKernels& k = code_kernels();
  if (scale.data && !scale.by_row && !scale.by_group) {  // one scale for all: cut anywhere
    const int64_t count = units.rows * units.columns;
    by_rows((count + kBuffer - 1) / kBuffer, kBuffer, threads, [&](int64_t first, int64_t last) {
      as_float(x, out, half, first * kBuffer, std::min(count, last * kBuffer) - first * kBuffer,
               [&](const float* a, float* b, int64_t n) { k.round(book, a, n, *scale.data, offset, b); });
    });
    return;
  }
  by_units(units, threads, [&](int64_t row, int64_t group, int64_t start, int64_t length) {
    float s;
    if (scale.data) {
      s = scale.at(units, row, group);
    } else {
      uint32_t largest = 0;
      if (half) {
        const uint16_t* from = static_cast<const uint16_t*>(x) + start;
        for (int64_t i = 0; i < length; ++i) largest = std::max(largest, uint32_t(from[i] & 0x7fff) << 16);
      } else {
        largest = k.largest(static_cast<const float*>(x) + start, length);
      }
      s = dynamic_scale(largest, reach, book.top);
    }
    as_float(x, out, half, start, length,
             [&](const float* a, float* b, int64_t n) { k.round(book, a, n, s, offset, b); });
  });
}

void round_chosen(const std::vector<const Codebook*>& books, const Units& units, const float* x, PerUnit<float> scale,
                  PerUnit<uint8_t> choice, float* out, int threads) {
  const CodeKernels& k = code_kernels();
  by_units(units, threads, [&](int64_t row, int64_t group, int64_t start, int64_t length) {
    const float s = scale.at(units, row, group);
    k.round(*books[choice.at(units, row, group)], x + start, length, s, nullptr, out + start);
  });
}

void pass_units(const float* limits, const Units& units, const float* x, const float* grad, const float* rounded,
                PerUnit<float> scale, PerUnit<uint8_t> choice, float* x_grad, float* slopes, int threads) {
  const CodeKernels& k = code_kernels();
  by_units(units, threads, [&](int64_t row, int64_t group, int64_t start, int64_t length) {
    const float* limit = limits + 2 * (choice.data ? choice.at(units, row, group) : 0);
    slopes[row * units.groups() + group] =
        float(k.pass(x + start, grad + start, rounded + start, length, scale.at(units, row, group), limit[0],
                     limit[1], x_grad + start));
  });
}

void encode_units(const std::vector<const Codebook*>& books, const Units& units, int bits, const float* x,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, uint8_t* packed, int threads) {
  const CodeKernels& k = code_kernels();
  const int64_t full = packed_size(units.group, bits), groups = units.groups();
  const int64_t row_bytes = (groups - 1) * full + packed_size(group_range(units, groups - 1).length, bits);
  by_rows(units.rows, units.columns, threads, [&](int64_t first, int64_t last) {
    uint8_t codes[kBuffer];
    for (int64_t row = first; row < last; ++row)
      for (int64_t group = 0; group < groups; ++group) {
        const Range range = group_range(units, group);
        const Codebook& book = *books[choice.data ? choice.at(units, row, group) : 0];
        const float s = scale.at(units, row, group);
        const float* from = x + row * units.columns + range.start;
        uint8_t* to = packed + row * row_bytes + group * full;
        for (int64_t i = 0; i < range.length; i += kBuffer) {
          const int64_t n = std::min(kBuffer, range.length - i);
          k.encode(book, from + i, n, s, codes);
          pack(codes, n, bits, to + i / 8 * bits);
        }
      }
  });
}

bool ValueRuns::take(const float* table) {
  std::memset(static_cast<void*>(this), 0, sizeof *this);
  auto same = [](float a, float b) { return std::memcmp(&a, &b, sizeof a) == 0; };
  for (int h = 0; h < 16; ++h) {
    const float* run = table + 16 * h;
    const float first = run[0], by = run[1] - run[0];
    bool even = true;
    for (int l = 0; l < 16; ++l) even &= same(std::fma(float(l), by, first), run[l]);
    if (even) {
      base[h] = first, step[h] = by;
      continue;
    }
    if (listed == kListed) return false;
    selected[listed][h] = 1;
    std::copy_n(run, 16, list[listed++]);
  }
  for (int i = 0; i < 256; ++i) {  // as CodeKernels::lookup_runs
    float v = std::fma(float(i % 16), step[i / 16], base[i / 16]);
    for (int k = 0; k < listed; ++k) v = std::fma(list[k][i % 16], selected[k][i / 16], v);
    if (!same(v, table[i])) return false;
  }
  return true;
}

int64_t CodedTable::row_bytes() const {
  const int64_t groups = units.groups();
  return (groups - 1) * packed_size(units.group, bits) + packed_size(group_range(units, groups - 1).length, bits);
}

void decode_row(const CodedTable& table, int64_t row, float* out) {
  const CodeKernels& k = code_kernels();
  const Units& units = table.units;
  const int bits = table.bits;
  const int64_t full = packed_size(units.group, bits), groups = units.groups();
  const uint8_t* packed = table.packed + row * table.row_bytes();
  uint8_t codes[kBuffer];
  for (int64_t group = 0; group < groups; ++group) {
    const Range range = group_range(units, group);
    const int book = table.choice.data ? table.choice.at(units, row, group) : 0;
    const float* values = table.values + (size_t(book) << bits);
    const float scale = table.scale.at(units, row, group);
    const uint8_t* from = packed + group * full;
    float* to = out + range.start;
    if (!table.runs.empty()) {
      k.lookup_runs(table.runs[book], from, range.length, scale, to);
      continue;
    }
    if (bits == 8) {
      k.lookup(values, bits, from, range.length, scale, to);
      continue;
    }
    const int64_t bytes = packed_size(range.length, bits);
    for (int64_t j = 0; j < range.length; j += kBuffer) {
      const int64_t n = std::min(kBuffer, range.length - j), skip = j / 8 * bits;
      unpack(from + skip, bytes - skip, n, bits, codes);
      k.lookup(values, bits, codes, n, scale, to + j);
    }
  }
}

void decode_units(const float* tables, const Units& units, int bits, const uint8_t* packed,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, float* out, int threads) {
  decode_rows({tables, units, bits, packed, scale, choice, {}}, out, threads);
}

void decode_rows(const CodedTable& table, float* out, int threads) {
  const Units& units = table.units;
  by_rows(units.rows, units.columns, threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) decode_row(table, row, out + row * units.columns);
  });
}

void fit_units(const Codebook& book, const Units& units, const float* x, const float* weights, PerUnit<float> scale,
               Fit* fits, int threads) {
  const CodeKernels& k = code_kernels();
  by_units(units, threads, [&](int64_t row, int64_t group, int64_t start, int64_t length) {
    fits[row * units.groups() + group] =
        k.fit(book, x + start, weights ? weights + start : nullptr, length, scale.at(units, row, group));
  });
}

void add_to_histogram(const float* x, const float* weights, int64_t count, int half, double* histogram) {
  const CodeKernels& k = code_kernels();
  uint16_t cells[kBuffer];
  for (int64_t i = 0; i < count; i += kBuffer) {
    const int64_t n = std::min(kBuffer, count - i);
    k.cells(x + i, n, half, cells);
    for (int64_t j = 0; j < n; ++j) histogram[cells[j]] += weights ? double(weights[i + j]) : 1.0;
  }
}

CoarseTable::CoarseTable(const float* table, int half, int columns, const int32_t* first, int books)
    : half_(half),
      columns_(columns),
      panels_((columns + kMixColumns - 1) / kMixColumns),
      first_(first, first + books + 1),
      table_(size_t(panels_) * 2 * half * kMixColumns) {
  for (int cell = 0; cell < 2 * half; ++cell)
    for (int column = 0; column < columns; ++column)
      table_[(size_t(column / kMixColumns) * 2 * half + cell) * kMixColumns + column % kMixColumns] =
          table[size_t(cell) * columns + column];
}

void CoarseTable::pick(const float* errors, int best, int32_t* out) const {
  for (size_t book = 0; book + 1 < first_.size(); ++book) {
    int32_t* found = out + book * best;
    int count = 0;
    for (int32_t column = first_[book]; column < first_[book + 1]; ++column) {
      if (count == best && !(errors[column] < errors[found[count - 1]])) continue;
      int place = count < best ? count++ : best - 1;
      for (; place > 0 && errors[column] < errors[found[place - 1]]; --place) found[place] = found[place - 1];
      found[place] = column;
    }
    for (; count < best; ++count) found[count] = found[0];  // fewer scales than asked for
  }
}

void CoarseTable::search(const Units& units, const float* x, const float* weights, int best, int32_t* out,
                         int threads) const {
  const CodeKernels& k = code_kernels();
  constexpr int kBatch = 8 * kMixUnits;
  const int cells = 2 * half_, books = int(first_.size()) - 1;
  const int64_t count = units.rows * units.groups();
  const int64_t batches = (count + kBatch - 1) / kBatch;
  parallel_for(int(batches), count * std::min(units.group, units.columns) < 4 * kPiece ? 1 : threads, [&](int batch) {
    static thread_local std::vector<float> histograms, errors;
    static thread_local std::vector<uint16_t> lists, places;
    const int64_t begin = int64_t(batch) * kBatch;
    const int in_batch = int(std::min<int64_t>(kBatch, count - begin));
    histograms.assign(size_t(kBatch) * cells, 0.0f);
    errors.resize(size_t(kBatch) * panels_ * kMixColumns);
    lists.resize(size_t(kBatch) * cells);
    int counts[kBatch];
    // If a unit uses few cells, take only those. Empty ones add nothing, so the sums are the same.
    const bool few = std::min(units.group, units.columns) < cells / 3;
    for (int u = 0; u < in_batch; ++u) {
      const Range range = group_range(units, (begin + u) % units.groups());
      const int64_t start = (begin + u) / units.groups() * units.columns + range.start;
      float* histogram = histograms.data() + size_t(u) * cells;
      places.resize(range.length);
      k.cells(x + start, range.length, half_, places.data());
      if (weights)
        for (int64_t i = 0; i < range.length; ++i) histogram[places[i]] += weights[start + i];
      else
        for (int64_t i = 0; i < range.length; ++i) histogram[places[i]] += 1.0f;
      if (!few) continue;
      uint64_t used[64] = {};  // up to 4096 cells
      for (int64_t i = 0; i < range.length; ++i) used[places[i] / 64] |= uint64_t(1) << (places[i] % 64);
      int& filled = counts[u] = 0;
      for (int word = 0; word < cells / 64; ++word)
        for (uint64_t bits = used[word]; bits; bits &= bits - 1)
          lists[size_t(u) * cells + filled++] = uint16_t(word * 64 + std::countr_zero(bits));
    }
    const size_t row = size_t(panels_) * kMixColumns;
    for (int panel = 0; panel < panels_; ++panel) {
      const float* table = table_.data() + size_t(panel) * cells * kMixColumns;
      if (few) {
        for (int u = 0; u < in_batch; ++u)
          k.mix_few(histograms.data() + size_t(u) * cells, lists.data() + size_t(u) * cells, counts[u], table,
                    errors.data() + u * row + panel * kMixColumns);
        continue;
      }
      for (int u = 0; u < in_batch; u += kMixUnits) {
        const int n = std::min(kMixUnits, in_batch - u);
        const float* from[kMixUnits];
        float* to[kMixUnits];
        for (int i = 0; i < n; ++i) {
          from[i] = histograms.data() + size_t(u + i) * cells;
          to[i] = errors.data() + (u + i) * row + panel * kMixColumns;
        }
        k.mix(from, n, table, cells, to);
      }
    }
    for (int u = 0; u < in_batch; ++u) pick(errors.data() + u * row, best, out + (begin + u) * books * best);
  });
}

void CoarseTable::search_histogram(const double* histogram, int best, int32_t* out) const {
  std::vector<float> weights(2 * half_), errors(size_t(panels_) * kMixColumns);
  std::transform(histogram, histogram + 2 * half_, weights.begin(), [](double w) { return float(w); });
  for (int panel = 0; panel < panels_; ++panel) {
    const float* from = weights.data();
    float* to = errors.data() + panel * kMixColumns;
    code_kernels().mix(&from, 1, table_.data() + size_t(panel) * 2 * half_ * kMixColumns, 2 * half_, &to);
  }
  pick(errors.data(), best, out);
}

}  // namespace dybit
