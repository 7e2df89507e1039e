// The kernel layout of a packed weight, and what a kernel is given. Must not know Python, torch or files.
//
// A weight of shape (rows, columns) is cut into blocks of 16 rows, and its columns into segments. A segment never
// crosses a group of the weight or of the input, and is short enough for its sum of products of significands to fit
// 32 bits; its columns are padded to chunks of 32. What every kernel computes, in this order and nothing else:
//
//   total = 0
//   for each segment s:  d = exact integer sum over its columns of significand(x) · significand(w)
//                        total = fma(float(d), factor, total),  factor = weight scale · input scale of the group
//   y = fma(total, input scale of the row, bias)
//
// all in FP32, one rounding each; float(d) rounds to nearest even. So all instruction sets agree bit for bit.
// One row of unquantized (FP32) inputs: d is a float, summed with fma in 16 lanes (column modulo 16) that are then folded
// in halves (8, 4, 2, 1). Several rows: y is the sum with fma, in the order of the columns, of inputs times the values of the
// weights (significand times scale, rounded once), plus the bias.
//
// A chunk of a block is 16 rows × 32 columns; row = 4·L + r lies in 128-bit lane L of register r (of 64 bytes), column
// = 16·s + j in byte j of that lane:
//
//   bits  registers   bits of a byte, least significant first
//    2    2           s0 of r=2q, s1 of r=2q, s0 of r=2q+1, s1 of r=2q+1        (two bits each, q the register)
//    3    2 + 1       as 2 bits; then the top bits: r0 s0, r0 s1, r1 s0, … r3 s1 (one bit each)
//    4    4           s0, s1                                                    (four bits each, r the register)
//    8    8           the significand itself, a signed byte; registers s0 r0 … s0 r3, s1 r0 … s1 r3
//   16   16           the significand itself, 16 bits; registers by eighths of the columns, then by r
//   kRuns 8           an index of 8 bits, see Runs; registers as for 8, columns of a lane in the order 0 8 1 9 … 7 15
//
// Codes of 5 to 8 bits are stored as significands of 8 bits if all that the weight may use fit, else as indices into Runs
// if its codebooks have that form, else as significands of 16 bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dybit {

constexpr int kBlockRows = 16;
constexpr int kChunk = 32;
constexpr int kMaxBooks = 32;
constexpr int kRuns = 9;  // a storage, see above
constexpr int kMaxSegment = 4096;  // columns; keeps a panel of unpacked weights in the L2 cache

struct Segment {
  int32_t start, length;  // columns of the weight
  int32_t chunk, chunks;  // where they lie in the padded layout
  int32_t group;          // of the weight
  int32_t input_group;
};

// A codebook of up to 256 significands of 16 bits as 16 runs, of 16 each: entry l of run h is base[h] + l · step[h], except
// in runs kTop and kBottom, which are given one by one. A tapered code is like that: its step changes with the leading ones,
// and only from three on within 16 codes. Steps times 15 fit 16 bits. Two bytes of a number lie in two tables.
struct Runs {
  static constexpr int kTop = 7, kBottom = 15;
  alignas(16) int8_t step[16];  // 0 in runs kTop and kBottom, as is the base
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

// How an input is held: as FP32, or as significands that fit the type.
enum class InputKind : int { kFloat = 0, kSigned8 = 1, kUnsigned8 = 2, kSigned16 = 3 };

struct Weight {
  int rows, columns;
  int storage;  // 2, 3, 4, 8, kRuns or 16, see above
  int blocks;
  int segment_count, chunk_count;
  const Segment* segments;
  size_t chunk_bytes;
  const uint8_t* codes;    // [blocks][chunk_count][chunk_bytes]
  const float* scales;     // [blocks][segment_count][16], times the value of one significand unit
  const uint8_t* choices;  // [blocks][segment_count or 1][16]: the table of each row; storage 2 to 4 and kRuns
  bool choice_by_segment;
  const int8_t* tables;  // [kMaxBooks][16] significands by code, repeated to 16 entries
  const Runs* runs;      // by codebook; storage kRuns only
  int max_weight;        // largest magnitude of a significand

  // Of the 16 rows of a block in a segment.
  const float* scales_at(int block, int s) const { return scales + (size_t(block) * segment_count + s) * kBlockRows; }
  const uint8_t* choices_at(int block, int s) const {
    return choices + (choice_by_segment ? size_t(block) * segment_count + s : size_t(block)) * kBlockRows;
  }
};

struct Input {
  int rows;
  InputKind kind;
  int max_input;  // largest magnitude of a significand
  const void* data;             // [rows][chunk_count · 32] of the kind's type, zero where padded
  const int32_t* segment_sums;  // [rows][segment_count] of significands; kSigned8 only
  const float* group_scales;    // [rows][segment_count], or null where a row has one scale
  const float* row_scales;      // [rows]; 1 where groups have scales
};

struct Output {
  float* data;        // [rows][stride]
  int64_t stride;
  const float* bias;  // [blocks · 16]
};

// What may follow a linear layer. All but kRelu are x · σ(x · q(x²)) with a polynomial q (activation.inc).
enum class Activation : int { kNone = 0, kRelu, kGelu, kGeluTanh, kSilu, kQuickGelu };
constexpr int kActivations = 6;

// How an input is rounded to significands.
struct Rounding {
  int magnitude_bits, max_run;
  bool is_signed, dynamic;
  float reach;          // dynamic: the value that the largest magnitude becomes
  float scale, offset;  // static
};

struct EncodeTask {
  const float* x;  // [rows][columns]
  int columns;
  const Rounding* rounding;
  const Segment* segments;
  int segment_count;
  int padded;  // columns of the result
  InputKind kind;
  void* data;
  int32_t* segment_sums;  // or null
  float* group_scales;    // or null
  float* row_scales;
  uint8_t* has_nan;
};

struct CodeKernels;  // codes.h

// One instruction set.
struct Kernels {
  const char* name;
  int unit_blocks;  // blocks of rows that share unpacked weights: the grain of the work for threads
  // How signed or unsigned inputs of a magnitude are held for a weight.
  InputKind (*input_kind)(int storage, int max_weight, int max_input, bool input_is_signed);
  void (*linear)(const Weight&, const Input&, const Output&, int first_block, int last_block);
  void (*encode)(const EncodeTask&, int first_row, int last_row);
  // Row-major values of some blocks: FP32 [16 · blocks][columns], significand times scale, rounded once.
  void (*dequantize)(const Weight&, float* out, int first_block, int last_block);
  void (*activate)(Activation, float* data, int rows, int columns, int64_t stride);  // in place
  const CodeKernels* codes;
  // Products of bytes in registers alone, as fast as they come; returns how many. Null: not with single instructions.
  int64_t (*multiply)(int64_t count);
};

extern const Kernels kScalar;
extern const CodeKernels kScalarCodes;
#if defined(__aarch64__) || defined(_M_ARM64)
extern const Kernels kNeon;
extern const Kernels kNeonDot;
extern const CodeKernels kNeonCodes;
#endif
#if defined(__x86_64__) || defined(_M_X64)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const CodeKernels kAvx2Codes;
extern const CodeKernels kAvx512Codes;
#endif
// Where the compiler knows the instructions; AMX where it is known, too, how to ask the system for it.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define DYBIT_AVX_VNNI
extern const Kernels kAvxVnni;
#if defined(__linux__)
#define DYBIT_AMX
extern const Kernels kAmx;
bool amx_permitted();  // asks once, for the process
#endif
#endif

}  // namespace dybit
