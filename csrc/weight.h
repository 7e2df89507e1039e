// The layout of packed weights in memory, and the computation of every kernel.
//
// A weight of shape (rows, columns) is cut into blocks of 16 rows, and its columns into segments. A segment stays
// within one group of the weight and one group of the input. It is short enough that its sum of products of
// significands fits 32 bits. Its columns are padded to chunks of 32. Every kernel computes exactly this, in this order:
//
//   total = 0
//   for each segment s:  d = exact integer sum over its columns of significand(x) · significand(w)
//                        total = fma(float(d), factor, total),  factor = weight scale · input scale of the group
//   y = fma(total, input scale of the row, bias)
//
// All of it is FP32 with one rounding each; float(d) rounds to nearest even. So all instruction sets give the same
// bits. FP32 inputs that are not rounded:
// - One row: d is a float, summed with fma in 16 lanes (column modulo 16), then folded in halves (8, 4, 2, 1).
// - Several rows: y is the bias plus a sum with fma, in the order of the columns, of inputs times the values of the
//   weights. A value is the significand times the scale, rounded once.
//
// A chunk of a block is 16 rows × 32 columns in registers of 64 bytes. Row 4·L + r lies in 128-bit lane L of register
// r, column 16·s + j in byte j of that lane:
//
//   storage   registers   bits of a byte, least significant first
//   kCodes2    2          s0 of r=2q, s1 of r=2q, s0 of r=2q+1, s1 of r=2q+1        (two bits each, q the register)
//   kCodes3    2 + 1      as kCodes2; then the top bits: r0 s0, r0 s1, r1 s0, … r3 s1 (one bit each)
//   kCodes4    4          s0, s1                                                    (four bits each, r the register)
//   kBytes     8          the significand, a signed byte; registers s0 r0 … s0 r3, s1 r0 … s1 r3
//   kRuns      8          an index into Runs; registers as kBytes, columns of a lane in the order 0 8 1 9 … 7 15
//   kWords    16          the significand, 16 bits; registers by eighths of the columns, then by r
//
// Codes of 5 to 8 bits are stored as kBytes if all significands that the weight may use fit 8 bits. Else they are
// stored as kRuns if the codebooks have that form, and as kWords if not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dybit {

constexpr int kBlockRows = 16;
constexpr int kChunk = 32;
constexpr int kMaxBooks = 32;
constexpr int kMaxSegment = 4096;  // columns; a panel of unpacked weights stays in the L2 cache

enum class Storage : int { kCodes2 = 2, kCodes3 = 3, kCodes4 = 4, kBytes = 8, kRuns = 9, kWords = 16 };

// Bits of a weight in memory.
constexpr int stored_bits(Storage storage) { return storage == Storage::kRuns ? 8 : int(storage); }

// Whether a code is looked up in a table of 16 significands.
constexpr bool is_code(Storage storage) { return storage <= Storage::kCodes4; }

// Whether significands are looked up: in such a table or in Runs.
constexpr bool has_tables(Storage storage) { return is_code(storage) || storage == Storage::kRuns; }

// Whether significands need 16 bits.
constexpr bool is_wide(Storage storage) { return storage > Storage::kBytes; }

struct Segment {
  int32_t start, length;  // columns of the weight
  int32_t chunk, chunks;  // in the padded layout
  int32_t group;          // of the weight
  int32_t input_group;
};

// A codebook of up to 256 significands of 16 bits, as 16 runs of 16. Entry l of run h is base[h] + l · step[h]. Runs
// kTop and kBottom are listed entry by entry. A tapered code has this form: its step changes with the leading ones, and
// only from three on within 16 codes. A step times 15 fits 16 bits. The two bytes of a number lie in two tables.
struct Runs {
  static constexpr int kTop = 7, kBottom = 15;
  static constexpr int kTables = 7;  // of 16 bytes each, from `step` on
  alignas(16) int8_t step[16];       // 0 in runs kTop and kBottom, as is the base
  alignas(16) int8_t base_low[16], base_high[16];
  alignas(16) int8_t top_low[16], top_high[16], bottom_low[16], bottom_high[16];
  alignas(64) int8_t low[256], high[256];  // the same by the whole index

  int at(int index) const {
    const int h = index >> 4, l = index & 15;
    auto number = [](int8_t low, int8_t high) { return int16_t(uint8_t(low) | uint8_t(high) << 8); };
    if (h == kTop) return number(top_low[l], top_high[l]);
    if (h == kBottom) return number(bottom_low[l], bottom_high[l]);
    return int16_t(number(base_low[h], base_high[h]) + l * step[h]);
  }
};

struct Weight {
  int rows, columns;
  Storage storage;
  int blocks;
  int segment_count, chunk_count;
  const Segment* segments;
  size_t chunk_bytes;
  const uint8_t* codes;    // [blocks][chunk_count][chunk_bytes]
  const float* scales;     // [blocks][segment_count][16], times the value of one significand unit
  const uint8_t* choices;  // [blocks][segment_count or 1][16]: the table of each row, if has_tables(storage)
  bool choice_by_segment;
  const int8_t* tables;  // [kMaxBooks][16] significands by code, repeated to 16 entries
  const Runs* runs;      // [kMaxBooks]; kRuns only
  int max_weight;        // largest magnitude of a significand

  // Of the 16 rows of a block in a segment.
  const uint8_t* codes_at(int block, int s) const {
    return codes + (size_t(block) * chunk_count + segments[s].chunk) * chunk_bytes;
  }
  const float* scales_at(int block, int s) const { return scales + (size_t(block) * segment_count + s) * kBlockRows; }
  const uint8_t* choices_at(int block, int s) const {
    return choices + (choice_by_segment ? size_t(block) * segment_count + s : size_t(block)) * kBlockRows;
  }
  // One significand of a chunk.
  int significand(const uint8_t* chunk, int row, int column, int choice) const {
    const int8_t* table = tables + choice * 16;
    const int r = row % 4, s = column / 16, byte = row / 4 * 16 + column % 16;
    switch (storage) {
      case Storage::kCodes2: return table[chunk[r / 2 * 64 + byte] >> (r % 2 * 4 + s * 2) & 3];
      case Storage::kCodes3:
        return table[(chunk[r / 2 * 64 + byte] >> (r % 2 * 4 + s * 2) & 3) |
                     (chunk[128 + byte] >> (r * 2 + s) & 1) << 2];
      case Storage::kCodes4: return table[chunk[r * 64 + byte] >> (s * 4) & 15];
      case Storage::kBytes: return int8_t(chunk[(s * 4 + r) * 64 + byte]);
      case Storage::kRuns:
        return runs[choice].at(chunk[(s * 4 + r) * 64 + row / 4 * 16 + column % 8 * 2 + column / 8 % 2]);
      default: {
        int16_t value;
        std::memcpy(&value, chunk + (column / 8 * 4 + r) * 64 + row / 4 * 16 + column % 8 * 2, 2);
        return value;
      }
    }
  }
  // Rows of a block that are not padding.
  int rows_of(int block) const {
    const int left = rows - block * kBlockRows;
    return left < kBlockRows ? left : kBlockRows;
  }
};

}  // namespace dybit
