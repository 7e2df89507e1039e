// Codebooks: rounding to the nearest of up to 256 levels, the values of codes, and the sums that a search for scales
// needs.
//
// The index of the nearest level of x is the number of boundaries below x. So ties, and inputs between two floats, are
// decided when the boundaries are made (Codebook.boundaries in dybit/formats/codebook.py). The boundaries are stored as
// the levels of a search tree: the root, its 2 children, their 4 …. A tree of up to 4 levels fits one register of 16
// floats.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dybit {

struct GatherTask;
struct DepthwiseTask;
struct FinishTask;

constexpr int kMaxLevels = 256;

struct Codebook {
  // boundaries: count - 1 in increasing order; values and codes: count, by level.
  Codebook(const float* boundaries, const float* level_values, const uint8_t* level_codes, int count);

  int steps;  // of a search: there are at most 2^steps levels
  float top;  // the largest magnitude
  alignas(64) float tree[kMaxLevels];    // node p of level j at 2^j - 1 + p; infinity beyond the boundaries
  alignas(64) float values[kMaxLevels];  // the last repeated to the end
  alignas(64) uint8_t codes[kMaxLevels];
};

// A table of 256 values as 16 runs of 16: entry l of run h is base[h] + l · step[h], plus list[i][l] where selected[i][h]
// is 1. Tapered codebooks have this form.
struct ValueRuns {
  static constexpr int kListed = 2;  // runs whose entries are listed, at most

  // Whether a table has this form, bit for bit.
  bool take(const float* table);

  alignas(64) float base[16], step[16];
  int listed;
  alignas(64) float selected[kListed][16], list[kListed][16];
};

// The sums of a search for scales over a unit of elements: in 16 lanes of FP32, added to doubles every 1024 elements.
struct Fit {
  double error, cross, square;  // of (x - scale · value)², value · x and value², each weighted
};

// The functions of an instruction set. All sets give the same bits.
struct CodeKernels {
  // out = value · scale (+ offset) of the level nearest to (x (- offset)) / scale; NaN stays NaN.
  void (*round)(const Codebook&, const float* x, int64_t count, float scale, const float* offset, float* out);
  void (*encode)(const Codebook&, const float* x, int64_t count, float scale, uint8_t* codes);
  // The bits of the largest magnitude; those of NaN are above infinity's.
  uint32_t (*largest)(const float* x, int64_t count);
  // out = table[code] · scale; the table has 2^bits entries.
  void (*lookup)(const float* table, int bits, const uint8_t* codes, int64_t count, float scale, float* out);
  // The same for the table of 8 bits that `runs` stands for.
  void (*lookup_runs)(const ValueRuns& runs, const uint8_t* codes, int64_t count, float scale, float* out);
  // weights: one for each element, or null.
  Fit (*fit)(const Codebook&, const float* x, const float* weights, int64_t count, float scale);
  // The straight-through estimator: x_grad is grad if x / scale is from low to high, else 0. Returns
  // Σ grad · rounded - x_grad · x, summed as Fit is.
  double (*pass)(const float* x, const float* grad, const float* rounded, int64_t count, float scale, float low,
                 float high, float* x_grad);
  // The cell of each element, |x| ≤ 1: floor(sign · sqrt(|x|) · half) + half, from 0 to 2 · half - 1.
  void (*cells)(const float* x, int64_t count, int half, uint16_t* out);
  // sums[unit][column] = Σ histogram[unit][cell] · table[cell][column], by fma over the cells in order; 64 columns.
  void (*mix)(const float* const* histograms, int units, const float* table, int cells, float* const* sums);
  // The same for one unit and the cells of a list.
  void (*mix_few)(const float* histogram, const uint16_t* list, int count, const float* table, float* sums);
  // For convolutions (conv_tasks.h). sums: [rows][segments] of the gathered significands, if they are signed bytes; or null.
  void (*gather)(const GatherTask&, const int64_t* origins, int rows, uint8_t* out, int32_t* sums);
  void (*depthwise)(const DepthwiseTask&);
  // Returns whether a result that is rounded is NaN.
  bool (*finish)(const FinishTask&, int rows);
  // Converts significands to a wider kind: bytes to 16 bits, any kind to FP32.
  void (*convert)(InputKind from, const void* x, int64_t count, InputKind to, void* out);
};

constexpr int kMixColumns = 64, kMixUnits = 6;

// Elements in rows of `columns`, cut into groups. A group is a unit; the last of a row may be shorter.
struct Units {
  int64_t rows, columns, group;
  int64_t groups() const { return (columns + group - 1) / group; }
};

// One number for each unit, each row, each column of units, or for all.
template <class T>
struct PerUnit {
  const T* data;  // null: none
  bool by_row, by_group;
  T at(const Units& units, int64_t row, int64_t group) const {
    return data[(by_row ? row * (by_group ? units.groups() : 1) : 0) + (by_group ? group : 0)];
  }
};

// x and out are FP32, or bfloat16 (`half`). If scale is null, it is dynamic (dynamic_scale in kernels.h).
void round_units(const Codebook& book, const Units& units, const void* x, void* out, bool half, PerUnit<float> scale,
                 const float* offset, float reach, int threads);

// The same for FP32 with a codebook for each unit.
void round_chosen(const std::vector<const Codebook*>& books, const Units& units, const float* x, PerUnit<float> scale,
                  PerUnit<uint8_t> choice, float* out, int threads);

// For training: CodeKernels::pass of each unit. limits: [books][2]. slopes: [units].
void pass_units(const float* limits, const Units& units, const float* x, const float* grad, const float* rounded,
                PerUnit<float> scale, PerUnit<uint8_t> choice, float* x_grad, float* slopes, int threads);

// Packs the codes of x, FP32. Each group starts at a byte (dybit/formats/packing.py).
void encode_units(const std::vector<const Codebook*>& books, const Units& units, int bits, const float* x,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, uint8_t* packed, int threads);

// The values of packed codes: tables[choice][2^bits] times scale.
void decode_units(const float* tables, const Units& units, int bits, const uint8_t* packed,
                  PerUnit<float> scale, PerUnit<uint8_t> choice, float* out, int threads);

// fits[unit] at the scale of each unit.
void fit_units(const Codebook& book, const Units& units, const float* x, const float* weights, PerUnit<float> scale,
               Fit* fits, int threads);

// Adds the weight of each element, or 1, to its cell of a histogram of 2 · half cells.
void add_to_histogram(const float* x, const float* weights, int64_t count, int half, double* histogram);

// The table of a coarse search. A column is a pair of codebook and scale; 64 columns form a panel.
class CoarseTable {
 public:
  // table: [2 · half][columns]; first: [books + 1], the first column of each codebook, and the end.
  CoarseTable(const float* table, int half, int columns, const int32_t* first, int books);

  // The `best` columns of the least error for each codebook: out[unit][book][best], by increasing error.
  void search(const Units& units, const float* x, const float* weights, int best, int32_t* out, int threads) const;
  void search_histogram(const double* histogram, int best, int32_t* out) const;

 private:
  void pick(const float* errors, int best, int32_t* out) const;

  int half_, columns_, panels_;
  std::vector<int32_t> first_;
  std::vector<float> table_;
};

}  // namespace dybit
