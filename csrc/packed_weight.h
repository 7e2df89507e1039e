// A weight in the layout of the kernels (weight.h), and linear layers with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"

namespace dybit {

// The portable form. The codes of each group start at a byte, in little-endian bits.
struct Portable {
  const uint8_t* packed;
  int64_t rows, columns;
  int bits;
  int64_t group_size;  // all columns if a row is one group
  const float* scale;
  bool scale_by_row, scale_by_group;
  const uint8_t* choice;  // or null
  bool choice_by_row, choice_by_group;
  const int32_t* significands;  // [books][2^bits]
  const float* steps;           // [books]: the value of one significand
  int books;
};

struct InputFormat {
  bool quantized;
  int magnitude_bits, max_run;
  bool is_signed;
  int64_t group_size;  // all columns if a row is one group

  // The significand of the value 1 at scale 1.
  float unit() const;
  // The largest value at scale 1.
  float top() const;
  // Rounding at a static scale; the offset may be null.
  Rounding rounding(float scale, const float* offset) const;
};

// Rows of inputs as significands, in the layout of a weight: see Input in kernels.h.
struct RoundedRows {
  int rows;
  InputKind kind;
  void* data;             // [rows][chunk_count · 32]
  int32_t* segment_sums;  // [rows][segment_count], or null
  float* group_scales;    // [rows][segment_count], or null
  float* row_scales;      // [rows]
  uint8_t* has_nan;       // [rows]: whether all results of a row are NaN
};

// The scale of inputs. Dynamic if scale is null: the largest magnitude of a group becomes `reach`. offset may be null.
struct InputScale {
  const float* scale;
  const float* offset;
  float reach;
};

class PackedWeight {
 public:
  // Throws std::invalid_argument if no kernel can hold the weight.
  PackedWeight(const Portable& portable, const InputFormat& input, const Kernels& kernels);

  // y (input_rows, rows) = x (input_rows, columns) · weightᵀ + bias, all FP32 and contiguous. bias may be null.
  // Rounding is dynamic if scale is null, else static. A row of x with NaN, or with infinity if rounding is dynamic,
  // gives a row of NaN.
  void linear(const float* x, int64_t input_rows, float* y, const float* bias, const float* scale, const float* offset,
              float reach, int threads, Activation activation = Activation::kNone) const;

  // The same in two halves, so that several layers share rounded inputs.
  //
  // Bytes of memory, aligned to 64, that hold so many rounded rows, and a view of it.
  size_t rounded_bytes(int64_t rows) const;
  RoundedRows rounded(int64_t rows, void* memory) const;
  // Some of the rows.
  RoundedRows slice(const RoundedRows& rows, int first, int count) const;
  // Whether rows that were rounded for one weight serve the other.
  bool shares_rows_with(const PackedWeight& other) const;
  // Rounds rows first … last - 1 of x, whose row 0 is at x; the second form rounds all rows.
  void round(const float* x, int64_t x_stride, const InputScale& scale, const RoundedRows& rows, int first,
             int last) const;
  void round(const float* x, int64_t x_stride, const InputScale& scale, const RoundedRows& rows, int threads) const;
  // y [rows][y_stride] = finished product. offset is that of the inputs, or null. y must not overlap factor and addend.
  void multiply(const RoundedRows& rows, const float* offset, const LinearFinish& finish, float* y, int64_t y_stride,
                int threads) const;

  // The values: FP32 (rows, columns).
  void dequantize(float* out, int threads) const;
  void dequantize_row(int row, float* out) const;  // (columns,)

  const Weight& weight() const { return weight_; }
  const Kernels& kernels() const { return kernels_; }
  InputKind kind() const { return kind_; }
  const InputFormat& input() const { return input_; }
  int max_input() const { return max_input_; }
  const std::vector<float>& row_sums() const { return row_sums_; }  // of each row's values
  size_t bytes() const { return memory_bytes_; }

 private:
  RoundedRows lay_out(int64_t rows, uintptr_t memory, uintptr_t* end) const;
  bool make_runs(const Portable& portable, const std::vector<bool>& used);
  void cut(const Portable& portable);
  void fill(const Portable& portable);

  const Kernels& kernels_;
  InputFormat input_;
  InputKind kind_ = InputKind::kFloat;
  int max_input_ = 0;
  bool many_input_groups_ = false;
  Weight weight_{};
  std::vector<Segment> segments_;
  struct Free {
    void operator()(uint8_t* memory) const;
  };
  std::unique_ptr<uint8_t, Free> memory_;  // codes, scales and choices
  size_t memory_bytes_ = 0;
  std::vector<float> row_sums_;  // for inputs with an offset
  struct alignas(64) Tables {
    int8_t entries[kMaxBooks * 16];
  };
  Tables tables_{};
  std::vector<Runs> runs_;          // of the codebooks; kRuns only
  std::vector<uint8_t> run_index_;  // [books][16]: the run that 16 codes became
};

// The largest magnitude of a significand of a plain format.
int max_significand(int magnitude_bits, int max_run);

}  // namespace dybit
