#include "packed_weight.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int kRowsAtOnce = 256;  // of inputs, at least
constexpr size_t kInputBytes = 384 << 10;
constexpr size_t kAlignment = 64, kHugePage = size_t(1) << 21;

// Bytes of a group of codes.
int64_t group_bytes(int64_t count, int bits) { return (count * bits + 7) / 8; }

// Reads the codes of one group in order.
class Reader {
 public:
  Reader(const uint8_t* from, int bits) : from_(from), bits_(bits) {}
  int next() {
    if (held_ < bits_) {
      word_ |= uint32_t(*from_++) << held_;
      held_ += 8;
    }
    const int code = int(word_ & ((1u << bits_) - 1));
    word_ >>= bits_;
    held_ -= bits_;
    return code;
  }

 private:
  const uint8_t* from_;
  uint32_t word_ = 0;
  int bits_, held_ = 0;
};

// Writes a code or significand to its place in a chunk of zeros (weight.h).
void place(uint8_t* chunk, Storage storage, int row, int column, int value) {
  const int r = row % 4, s = column / 16, byte = row / 4 * 16 + column % 16;
  switch (storage) {
    case Storage::kCodes2: chunk[r / 2 * 64 + byte] |= uint8_t(value << (r % 2 * 4 + s * 2)); break;
    case Storage::kCodes3:
      chunk[r / 2 * 64 + byte] |= uint8_t((value & 3) << (r % 2 * 4 + s * 2));
      chunk[128 + byte] |= uint8_t((value >> 2) << (r * 2 + s));
      break;
    case Storage::kCodes4: chunk[r * 64 + byte] |= uint8_t(value << (s * 4)); break;
    case Storage::kBytes: chunk[(s * 4 + r) * 64 + byte] = uint8_t(value); break;
    case Storage::kRuns:
      chunk[(s * 4 + r) * 64 + row / 4 * 16 + column % 8 * 2 + column / 8 % 2] = uint8_t(value);
      break;
    case Storage::kWords: {
      const int16_t wide = int16_t(value);
      std::memcpy(chunk + (column / 8 * 4 + r) * 64 + row / 4 * 16 + column % 8 * 2, &wide, 2);
    }
  }
}

// Zeros, aligned to a cache line. Large weights use huge pages: otherwise their stream waits for the address
// translation of every 4 KB.
uint8_t* allocate(size_t size) {
  auto* memory = static_cast<uint8_t*>(::operator new(size, std::align_val_t(kAlignment)));
#if defined(__linux__)
  if (size >= 2 * kHugePage) {
    const auto first = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
    const auto last = (reinterpret_cast<uintptr_t>(memory) + size) / kHugePage * kHugePage;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  std::memset(memory, 0, size);
  return memory;
}

struct Units {
  const Portable& p;
  int64_t groups = (p.columns + p.group_size - 1) / p.group_size;
  int64_t index(bool by_row, bool by_group, int64_t row, int64_t group) const {
    return (by_row ? row * (by_group ? groups : 1) : 0) + (by_group ? group : 0);
  }
  int choice(int64_t row, int64_t group) const {
    return p.choice ? p.choice[index(p.choice_by_row, p.choice_by_group, row, group)] : 0;
  }
  float scale(int64_t row, int64_t group) const {
    return p.scale[index(p.scale_by_row, p.scale_by_group, row, group)];
  }
};

}  // namespace

void PackedWeight::Free::operator()(uint8_t* memory) const {
  ::operator delete(memory, std::align_val_t(kAlignment));
}

int max_significand(int magnitude_bits, int max_run) {
  return ((2 << (magnitude_bits - max_run)) - 1) << (2 * max_run - 2);
}

float InputFormat::unit() const { return std::ldexp(1.0f, magnitude_bits - 1); }

float InputFormat::top() const { return float(max_significand(magnitude_bits, max_run)) / unit(); }

Rounding InputFormat::rounding(float scale, const float* offset) const {
  return {magnitude_bits, max_run, is_signed, false, 1.0f, scale, offset ? *offset : 0.0f};
}

PackedWeight::PackedWeight(const Portable& p, const InputFormat& input, const Kernels& kernels)
    : kernels_(kernels), input_(input) {
  if (p.rows < 1 || p.columns < 1 || p.rows > (1 << 28) || p.columns > (1 << 28) || p.books < 1 || p.books > kMaxBooks)
    throw std::invalid_argument("the weight is too large, or has too many codebooks");
  const Units units{p};
  std::vector<bool> used(p.books, p.choice == nullptr);
  const int64_t choices = (p.choice_by_row ? p.rows : 1) * (p.choice_by_group ? units.groups : 1);
  for (int64_t i = 0; p.choice && i < choices; ++i) {
    if (p.choice[i] >= p.books) throw std::invalid_argument("a choice is beyond the codebooks");
    used[p.choice[i]] = true;
  }
  int largest = 0;
  for (int book = 0; book < p.books; ++book)
    for (int code = 0; used[book] && code < 1 << p.bits; ++code)
      largest = std::max(largest, std::abs(p.significands[(book << p.bits) + code]));
  if (largest > 32767) throw std::invalid_argument("a significand does not fit 16 bits");
  weight_.rows = int(p.rows);
  weight_.columns = int(p.columns);
  weight_.max_weight = largest;
  if (largest <= 127)
    weight_.storage = p.bits <= 4 ? Storage(p.bits) : Storage::kBytes;
  else
    weight_.storage = make_runs(p, used) ? Storage::kRuns : Storage::kWords;
  if (input.quantized) {
    max_input_ = max_significand(input.magnitude_bits, input.max_run);
    kind_ = kernels.input_kind(weight_.storage, largest, max_input_, input.is_signed);
  }
  cut(p);
  fill(p);
}

// Makes Runs of the codebooks in use. Returns false if one does not have that form.
bool PackedWeight::make_runs(const Portable& p, const std::vector<bool>& used) {
  if (p.bits < 4) return false;
  const int count = (1 << p.bits) / 16;
  runs_.assign(size_t(p.books), Runs{});
  run_index_.assign(size_t(p.books) * 16, 0);
  auto split = [](int value, int8_t& low, int8_t& high) { low = int8_t(value), high = int8_t(value >> 8); };
  for (int book = 0; book < p.books; ++book) {
    if (!used[book]) continue;
    Runs& runs = runs_[book];
    auto values = [&](int i) { return p.significands + (size_t(book) << p.bits) + 16 * i; };
    auto steady = [&](int i) {
      const int step = values(i)[1] - values(i)[0];
      bool same = std::abs(step) <= 127;
      for (int l = 0; l < 16; ++l) same &= values(i)[l] == values(i)[0] + l * step;
      return same;
    };
    std::vector<int> listed, free;  // runs that are listed entry by entry, and places for the others
    for (int h = 0; h < 16; ++h)
      if (h != Runs::kTop && h != Runs::kBottom) free.push_back(h);
    for (int i = 0, next = 0; i < count; ++i) {
      if (!steady(i) || next == int(free.size())) {
        listed.push_back(i);
        continue;
      }
      const int h = free[next++];
      run_index_[book * 16 + i] = uint8_t(h);
      runs.step[h] = int8_t(values(i)[1] - values(i)[0]);
      split(values(i)[0], runs.base_low[h], runs.base_high[h]);
    }
    if (listed.size() > 2) return false;
    for (size_t place = 0; place < listed.size(); ++place) {
      run_index_[book * 16 + listed[place]] = place ? Runs::kBottom : Runs::kTop;
      for (int l = 0; l < 16; ++l)
        split(values(listed[place])[l], (place ? runs.bottom_low : runs.top_low)[l],
              (place ? runs.bottom_high : runs.top_high)[l]);
    }
    for (int i = 0; i < 256; ++i) split(runs.at(i), runs.low[i], runs.high[i]);
  }
  return true;
}

// Cuts columns into segments: at the ends of groups, and before sums could pass 32 bits. A biased sum may wrap on the
// way and is right again once the bias is subtracted. So segments depend on the formats, not on the instruction set.
void PackedWeight::cut(const Portable& p) {
  const int64_t input_group = input_.quantized ? input_.group_size : p.columns;
  const int64_t worst = int64_t(std::max(weight_.max_weight, 1)) * std::max(max_input_, 1);
  int64_t safe = std::min<int64_t>(kMaxSegment, std::numeric_limits<int32_t>::max() / worst);
  if (safe >= kChunk) safe -= safe % kChunk;
  int chunk = 0;
  for (int64_t start = 0; start < p.columns;) {
    const int64_t group = start / p.group_size, other = start / input_group;
    const int64_t end = std::min({start + safe, (group + 1) * p.group_size, (other + 1) * input_group, p.columns});
    const int chunks = int((end - start + kChunk - 1) / kChunk);
    segments_.push_back({int32_t(start), int32_t(end - start), chunk, chunks, int32_t(group), int32_t(other)});
    chunk += chunks;
    start = end;
  }
  many_input_groups_ = segments_.back().input_group > 0;
  weight_.segments = segments_.data();
  weight_.segment_count = int(segments_.size());
  weight_.chunk_count = chunk;
  weight_.blocks = int((p.rows + kBlockRows - 1) / kBlockRows);
  weight_.chunk_bytes = size_t(stored_bits(weight_.storage)) * kBlockRows * kChunk / 8;
}

void PackedWeight::fill(const Portable& p) {
  const Units units{p};
  const size_t size = size_t(weight_.blocks) * weight_.chunk_count * weight_.chunk_bytes;
  const size_t scales = size_t(weight_.blocks) * weight_.segment_count * kBlockRows;
  weight_.choice_by_segment = p.choice && p.choice_by_group && weight_.segment_count > 1;
  const int choice_units = weight_.choice_by_segment ? weight_.segment_count : 1;
  const size_t choices = size_t(weight_.blocks) * choice_units * kBlockRows;
  // One piece of memory: huge pages help scales and choices as much as codes.
  memory_bytes_ = size + scales * sizeof(float) + choices;
  memory_.reset(allocate(memory_bytes_));
  uint8_t* const codes_at = memory_.get();
  float* const scales_at = reinterpret_cast<float*>(codes_at + size);
  uint8_t* const choices_at = codes_at + size + scales * sizeof(float);
  row_sums_.assign(size_t(weight_.blocks) * kBlockRows, 0.0f);
  if (is_code(weight_.storage))
    for (int book = 0; book < p.books; ++book)
      for (int i = 0; i < 16; ++i)
        tables_.entries[book * 16 + i] = int8_t(p.significands[(book << p.bits) + (i & ((1 << p.bits) - 1))]);
  const int64_t full = group_bytes(p.group_size, p.bits);
  const int64_t tail = p.columns % p.group_size;
  const int64_t row_bytes = p.columns / p.group_size * full + group_bytes(tail, p.bits);
  for (int64_t row = 0; row < p.rows; ++row) {
    const size_t block = size_t(row / kBlockRows);
    const int n = int(row % kBlockRows);
    double total = 0;
    Reader reader(p.packed, p.bits);
    for (int s = 0; s < weight_.segment_count; ++s) {
      const Segment& segment = segments_[s];
      const int choice = units.choice(row, segment.group);
      const int32_t* table = p.significands + (size_t(choice) << p.bits);
      const float scale = units.scale(row, segment.group) * p.steps[choice];
      scales_at[(block * weight_.segment_count + s) * kBlockRows + n] = scale;
      if (weight_.choice_by_segment || s == 0)
        choices_at[(block * choice_units + (weight_.choice_by_segment ? s : 0)) * kBlockRows + n] = uint8_t(choice);
      if (segment.start % p.group_size == 0)
        reader = Reader(p.packed + row * row_bytes + segment.group * full, p.bits);
      int64_t sum = 0;
      for (int k = 0; k < segment.length; ++k) {
        const int code = reader.next();
        uint8_t* chunk = codes_at + (block * weight_.chunk_count + segment.chunk + k / kChunk) * weight_.chunk_bytes;
        const int stored = is_code(weight_.storage)            ? code
                           : weight_.storage == Storage::kRuns ? run_index_[choice * 16 + code / 16] * 16 + code % 16
                                                               : table[code];
        place(chunk, weight_.storage, n, k % kChunk, stored);
        sum += table[code];
      }
      total += double(scale) * double(sum);
    }
    row_sums_[row] = float(total);
  }
  weight_.codes = codes_at;
  weight_.scales = scales_at;
  weight_.choices = choices_at;
  weight_.tables = tables_.entries;
  weight_.runs = runs_.data();
}

RoundedRows PackedWeight::lay_out(int64_t rows, uintptr_t memory, uintptr_t* end) const {
  auto take = [&](size_t bytes) {
    const uintptr_t place = memory;
    memory += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<void*>(place);
  };
  const size_t m = size_t(rows), segments = size_t(weight_.segment_count);
  RoundedRows result{};
  result.rows = int(rows);
  result.kind = kind_;
  result.data = take(element_bytes(kind_) * m * weight_.chunk_count * kChunk);
  if (kind_ == InputKind::kSigned8) result.segment_sums = static_cast<int32_t*>(take(sizeof(int32_t) * m * segments));
  if (many_input_groups_) result.group_scales = static_cast<float*>(take(sizeof(float) * m * segments));
  result.row_scales = static_cast<float*>(take(sizeof(float) * m));
  result.has_nan = static_cast<uint8_t*>(take(m));
  if (end) *end = memory + kAlignment;  // whole registers may be read at the end
  return result;
}

size_t PackedWeight::rounded_bytes(int64_t rows) const {
  uintptr_t end;
  lay_out(rows, 0, &end);
  return end;
}

RoundedRows PackedWeight::rounded(int64_t rows, void* memory) const {
  return lay_out(rows, reinterpret_cast<uintptr_t>(memory), nullptr);
}

RoundedRows PackedWeight::slice(const RoundedRows& rows, int first, int count) const {
  const size_t row_bytes = size_t(element_bytes(kind_)) * weight_.chunk_count * kChunk;
  const size_t before = size_t(first) * weight_.segment_count;
  return {count,
          rows.kind,
          static_cast<uint8_t*>(rows.data) + first * row_bytes,
          rows.segment_sums ? rows.segment_sums + before : nullptr,
          rows.group_scales ? rows.group_scales + before : nullptr,
          rows.row_scales + first,
          rows.has_nan + first};
}

bool PackedWeight::shares_rows_with(const PackedWeight& other) const {
  const InputFormat &a = input_, &b = other.input_;
  return kind_ == other.kind_ && a.quantized == b.quantized && weight_.columns == other.weight_.columns &&
         (!a.quantized || (a.magnitude_bits == b.magnitude_bits && a.max_run == b.max_run &&
                           a.is_signed == b.is_signed && a.group_size == b.group_size)) &&
         std::equal(segments_.begin(), segments_.end(), other.segments_.begin(), other.segments_.end(),
                    [](const Segment& s, const Segment& t) {
                      return s.length == t.length && s.input_group == t.input_group;
                    });
}

void PackedWeight::round(const float* x, int64_t x_stride, const InputScale& scale, const RoundedRows& rows, int first,
                         int last) const {
  const Rounding rounding{std::max(input_.magnitude_bits, 1),
                          std::max(input_.max_run, 1),
                          input_.is_signed,
                          !scale.scale,
                          scale.reach,
                          scale.scale ? *scale.scale : 1.0f,
                          scale.offset ? *scale.offset : 0.0f};
  const EncodeTask task{x,
                        x_stride,
                        weight_.columns,
                        &rounding,
                        weight_.segments,
                        weight_.segment_count,
                        weight_.chunk_count * kChunk,
                        kind_,
                        rows.data,
                        rows.segment_sums,
                        rows.group_scales,
                        rows.row_scales,
                        rows.has_nan};
  kernels_.rows->encode(task, first, last);
}

void PackedWeight::round(const float* x, int64_t x_stride, const InputScale& scale, const RoundedRows& rows,
                         int threads) const {
  const int grain = std::max(1, 65536 / (weight_.chunk_count * kChunk));
  parallel_for((rows.rows + grain - 1) / grain, threads, [&](int i) {
    round(x, x_stride, scale, rows, i * grain, std::min(rows.rows, (i + 1) * grain));
  });
}

void PackedWeight::multiply(const RoundedRows& rows, const float* offset, const LinearFinish& finish, float* y,
                            int64_t y_stride, int threads) const {
  if (rows.rows == 0) return;
  const int m = rows.rows, padded = weight_.chunk_count * kChunk;
  const float* biases = finish.bias;
  if (!biases || offset || weight_.rows % kBlockRows) {
    static thread_local Scratch bias_memory;
    auto* whole = bias_memory.take<float>(size_t(weight_.blocks) * kBlockRows);
    std::fill_n(whole, size_t(weight_.blocks) * kBlockRows, 0.0f);
    if (finish.bias) std::copy_n(finish.bias, weight_.rows, whole);
    if (offset)
      for (int n = 0; n < weight_.rows; ++n) whole[n] = std::fma(*offset, row_sums_[n], whole[n]);
    biases = whole;
  }
  // A piece of work is about 256 KB of weights, or a share of them, in whole units. It takes as many rows of inputs as
  // the L2 cache holds together with the unpacked weights, which are unpacked again for the next rows.
  const int unit = kernels_.unit_blocks;
  const int units = (weight_.blocks + unit - 1) / unit;
  const size_t unit_bytes = size_t(unit) * weight_.chunk_count * weight_.chunk_bytes;
  const int wanted = m > 4 ? std::max(1, 64 / unit) : int(std::max<size_t>(1, (size_t(1) << 18) / unit_bytes));
  const int step = std::max(1, threads > 1 ? std::min(wanted, units / (4 * threads)) : wanted);
  const int steps = (units + step - 1) / step;
  const int most = std::max(kRowsAtOnce, int(kInputBytes / (size_t(element_bytes(kind_)) * padded)));
  const int64_t parts = (m + most - 1) / most;  // of nearly equal size: FP32 sums depend on whether a part is one row
  const size_t work = size_t(m) * weight_.rows * padded;
  parallel_for(int(parts) * steps, work < 200000 ? 1 : threads, [&](int i) {
    const int first = int(i / steps * m / parts), end = int((i / steps + 1) * m / parts);
    int block = i % steps * step * unit;
    const RoundedRows part = slice(rows, first, end - first);
    const Input in{part.rows,         kind_, max_input_, part.data, part.segment_sums, part.group_scales,
                   part.row_scales};
    const Output out{y + first * y_stride, y_stride, biases};
    const int last = std::min(weight_.blocks, block + step * unit);
    if (finish.is_bias_only()) return kernels_.linear(weight_, in, out, block, last);
    for (int next; block < last; block = next) {  // unit by unit, while the results are in the cache
      next = std::min(last, block + unit);
      kernels_.linear(weight_, in, out, block, next);
      const int column = block * kBlockRows;
      LinearFinish rest = finish;
      if (rest.factor) rest.factor += first * rest.factor_stride + column;
      if (rest.addend) rest.addend += first * rest.addend_stride + column;
      kernels_.rows->finish(rest, out.data + column, y_stride, in.rows, std::min(next * kBlockRows, weight_.rows) - column);
    }
  });
  for (int row = 0; row < m; ++row)
    if (rows.has_nan[row]) std::fill_n(y + row * y_stride, weight_.rows, std::numeric_limits<float>::quiet_NaN());
}

void PackedWeight::linear(const float* x, int64_t input_rows, float* y, const float* bias, const float* scale,
                          const float* offset, float reach, int threads, Activation activation) const {
  static thread_local Scratch rounded_memory;
  const RoundedRows rows = rounded(input_rows, rounded_memory.take<uint8_t>(rounded_bytes(input_rows)));
  round(x, weight_.columns, {scale, offset, reach}, rows, threads);
  multiply(rows, offset, {bias, activation}, y, weight_.rows, threads);
}

void PackedWeight::dequantize(float* out, int threads) const {
  parallel_for(weight_.blocks, threads, [&](int i) { kernels_.dequantize(weight_, out, i, i + 1); });
}

void PackedWeight::dequantize_row(int row, float* out) const {
  const int block = row / kBlockRows, n = row % kBlockRows;
  for (int s = 0; s < weight_.segment_count; ++s) {
    const Segment& segment = weight_.segments[s];
    const int choice = weight_.choices_at(block, s)[n];
    const float scale = weight_.scales_at(block, s)[n];
    const uint8_t* const codes = weight_.codes_at(block, s);
    for (int k = 0; k < segment.length; ++k)
      out[segment.start + k] =
          float(weight_.significand(codes + k / kChunk * weight_.chunk_bytes, n, k % kChunk, choice)) * scale;
  }
}

}  // namespace dybit
