// Functions of single FP32 numbers, of pairs and of rows. All instruction sets give the same bits.
#pragma once

#include <array>
#include <cstdint>

namespace dybit {

enum class Unary : int {
  kRelu = 0,
  kNeg,
  kAbs,
  kSqrt,
  kRsqrt,
  kExp,
  kSigmoid,
  kTanh,
  kSilu,
  kGelu,
  kGeluTanh,
  kQuickGelu,
  kHardSigmoid,  // min(max(x + 3, 0), 6) / 6
  kHardSwish,    // x · min(max(x + 3, 0), 6) / 6
};
constexpr int kUnaries = 14;

// y may be x.
void unary(Unary kind, const float* x, int64_t count, float* y, int threads);

// min(max(x, low), high); NaN stays NaN. y may be x.
void clamp(const float* x, int64_t count, float low, float high, float* y, int threads);

enum class Binary : int { kAdd = 0, kSub, kMul, kDiv };
constexpr int kBinaries = 4;

// An operand of shape sizes[3]. A stride of 0 broadcasts. The last stride is 0 or 1.
struct Operand {
  const float* data;
  std::array<int64_t, 3> strides;
};

// y [sizes] with strides y_strides, the last being 1. y may be an operand of the same strides.
void binary(Binary kind, const std::array<int64_t, 3>& sizes, const Operand& a, const Operand& b, float* y,
            const std::array<int64_t, 3>& y_strides, int threads);

// y = min(max(x · factor + shift, low), high), factor and shift by column. y may be x.
struct ColumnScales {
  int columns;
  const float *factor, *shift;  // [columns]
  float low, high;
};
void scale_columns(const ColumnScales& scales, const float* x, int64_t rows, float* y, int threads);

enum class Fold : int { kSum = 0, kMean, kNorm };  // kNorm: the root of the sum of squares

// y[rows] of x [rows][stride]
void fold_rows(Fold kind, const float* x, int64_t stride, int64_t rows, int columns, float* y, int threads);

// Softmax of contiguous rows. y may be x. Results below 2^-126 are zero.
void softmax(const float* x, int64_t rows, int columns, float* y, int threads);

}  // namespace dybit
