// LayerNorm and RMSNorm of FP32 rows.
#pragma once

#include <cstdint>

#include "packed_weight.h"

namespace dybit {

// s = x + addend;  y = (s - mean) / sqrt(variance + eps) · (weight + weight_shift) + bias.
// Root mean square: y = s / sqrt(mean of s² + eps) · (weight + weight_shift) + bias.
// sum may be x or addend, and y may be any of them, if the strides are equal.
struct NormTask {
  const float* x;  // [rows][x_stride]
  int64_t x_stride;
  const float* addend;  // [rows][addend_stride], or null
  int64_t addend_stride;
  float* sum;  // [rows][sum_stride]: s; or null
  int64_t sum_stride;
  const float* weight;  // [columns], or null: ones
  const float* bias;    // [columns], or null
  float eps;
  bool root_mean_square;
  float weight_shift;  // 0, or 1 as in Gemma
  int columns;
  float* y;  // [rows][y_stride], or null
  int64_t y_stride;
};

// Rounds y for `consumer` into `rounded`, if they are not null. Divides by a deviation that is within 1e-6 of the exact
// one for up to 2^16 columns, even if the mean is 10^4 times as large. All instruction sets give the same bits.
void norm(const NormTask& task, const PackedWeight* consumer, const InputScale& scale, const RoundedRows* rounded,
          int rows, int threads);

}  // namespace dybit
