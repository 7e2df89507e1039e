// Rounding to the nearest of up to 256 levels, what codes stand for, and the sums that a search for scales needs. For any
// codebook, over raw pointers. Must not know Python, torch or how scales are chosen.
//
// The nearest level of x has the index of how many boundaries lie below x, so that ties and inputs between floats are
// settled when the boundaries are made (dybit.codec.Codebook.boundaries). They are kept as the levels of a search tree:
// the root, its 2 children, their 4 …; a tree of up to 4 levels fits one register of 16 floats.
#pragma once

#include <cstdint>
#include <vector>

#include "weight.h"

namespace dybit {

struct GatherTask;
struct DepthwiseTask;
struct FinishTask;

constexpr int kMaxLevels = 256;
constexpr int kLanes = 16;  // of a sum: element i belongs to lane i mod 16

struct Codebook {
  // boundaries: count - 1 in increasing order; values and codes: count, by level.
  Codebook(const float* boundaries, const float* level_values, const uint8_t* level_codes, int count);

  int steps;  // of a search: 2^steps is at least the number of levels
  alignas(64) float tree[kMaxLevels];    // node p of level j at 2^j - 1 + p; infinity where there is no boundary
  alignas(64) float values[kMaxLevels];  // the last repeated to the end
  alignas(64) uint8_t codes[kMaxLevels];
};

// What a search for scales adds up over a unit of elements, in 16 lanes of FP32, every 1024 elements in doubles.
struct Fit {
  double error, cross, square;  // of (x - scale · value)², value · x and value², each weighted
};

// One instruction set. All give the same bits.
struct CodeKernels {
  // out = value · scale (+ offset) of the level nearest to (x (- offset)) / scale; NaN where that is.
  void (*round)(const Codebook&, const float* x, int64_t count, float scale, const float* offset, float* out);
  void (*encode)(const Codebook&, const float* x, int64_t count, float scale, uint8_t* codes);
  // The largest magnitude as its bits; those of NaN are above infinity's.
  uint32_t (*largest)(const float* x, int64_t count);
  // out = table[code] · scale, the table of 2^bits entries.
  void (*lookup)(const float* table, int bits, const uint8_t* codes, int64_t count, float scale, float* out);
  // weights: of every element, or null.
  Fit (*fit)(const Codebook&, const float* x, const float* weights, int64_t count, float scale);
  // Straight through: gradients where x / scale is from low to high, else 0; Σ grad · rounded - x_grad · x, like Fit's.
  double (*pass)(const float* x, const float* grad, const float* rounded, int64_t count, float scale, float low, float high,
                 float* x_grad);
  // The cell of every element of at most 1 in magnitude: floor(sign · sqrt(|x|) · half) + half, from 0 to 2 · half - 1.
  void (*cells)(const float* x, int64_t count, int half, uint16_t* out);
  // sums[unit][column] = Σ histogram[unit][cell] · table[cell][column] over the cells in order, fused, 64 columns.
  void (*mix)(const float* const* histograms, int units, const float* table, int cells, float* const* sums);
  // The same for one unit, of the cells in a list.
  void (*mix_few)(const float* histogram, const uint16_t* list, int count, const float* table, float* sums);
  // For convolutions (conv.h). Significands of a static scale, kFloat for whole FP32 numbers; whether there is NaN.
  bool (*significands)(const Rounding&, InputKind, const float* x, int64_t count, void* out);
  // Rows of a product from an image of significands; sums: [rows][segments] of 8-bit ones, or null.
  void (*gather)(const GatherTask&, const int64_t* origins, int rows, uint8_t* out, int32_t* sums);
  void (*depthwise)(const DepthwiseTask&, int places, float* out);
  // Adds, clamps, stores and rounds results; whether one that is rounded is NaN.
  bool (*finish)(const FinishTask&, int rows);
  // Significands of one kind as another that holds them: bytes as 16 bits, any as FP32.
  void (*convert)(InputKind from, const void* x, int64_t count, InputKind to, void* out);
};

constexpr int kMixColumns = 64, kMixUnits = 6;

// Elements in rows of `columns`, cut into groups: one unit each, the last of a row shorter.
struct Units {
  int64_t rows, columns, group;
  int64_t groups() const { return (columns + group - 1) / group; }
};

// A number for every unit, row, column of units, or for all.
template <class T>
struct PerUnit {
  const T* data;  // null: none
  bool by_row, by_group;
  T at(const Units& units, int64_t row, int64_t group) const {
    return data[(by_row ? row * (by_group ? units.groups() : 1) : 0) + (by_group ? group : 0)];
  }
};

// x and out are FP32, or bfloat16 (`half`). Where scale is null it is dynamic: what maps the largest magnitude to reach.
void round_units(const Codebook& book, const Units& units, const void* x, void* out, bool half, PerUnit<float> scale,
                 const float* offset, float reach, int threads);

// The same for FP32 with a codebook for every unit.
void round_chosen(const std::vector<const Codebook*>& books, const Units& units, const float* x, PerUnit<float> scale,
                  PerUnit<uint8_t> choice, float* out, int threads);

// For training: CodeKernels::pass of every unit, limits being [books][2]. slopes: [units].
void pass_units(const float* limits, const Units& units, const float* x, const float* grad, const float* rounded,
                PerUnit<float> scale, PerUnit<uint8_t> choice, float* x_grad, float* slopes, int threads);

// Packs the codes of x, FP32, every group from a byte on (dybit/packing.py).
void encode_units(const std::vector<const Codebook*>& books, const Units& units, int bits, const float* x,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, uint8_t* packed, int threads);

// The values of packed codes: tables[choice][2^bits] times scale. Rows by index where there is one, else all in order.
void decode_units(const float* tables, const Units& units, int bits, const uint8_t* packed, const int64_t* index,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, float* out, int threads);

// fits[unit] at the scale of every unit, or of all.
void fit_units(const Codebook& book, const Units& units, const float* x, const float* weights, PerUnit<float> scale,
               Fit* fits, int threads);

// Adds the elements' weights, or 1, to the cells of one histogram of 2 · half.
void add_to_histogram(const float* x, const float* weights, int64_t count, int half, double* histogram);

// The table of a coarse search, its columns (pairs of codebook and scale) in panels of 64.
class CoarseTable {
 public:
  // table: [2 · half][columns]; first: the first column of every codebook, and the end.
  CoarseTable(const float* table, int half, int columns, const int32_t* first, int books);

  // The `best` columns of the least error of every codebook: out[unit][book][best], by increasing error.
  void search(const Units& units, const float* x, const float* weights, int best, int32_t* out, int threads) const;
  void search_histogram(const double* histogram, int best, int32_t* out) const;

 private:
  void pick(const float* errors, int best, int32_t* out) const;

  int half_, columns_, panels_;
  std::vector<int32_t> first_;
  std::vector<float> table_;
};

}  // namespace dybit
