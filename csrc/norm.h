// LayerNorm and RMSNorm of FP32 rows.
#pragma once

#include <cstdint>

#include "packed_weight.h"

namespace dybit {

// s = x + addend;  y = (s - mean) / sqrt(variance + eps) · (weight + weight_shift) + bias.
// Root mean square: y = s / sqrt(mean of s² + eps) · (weight + weight_shift) + bias.
// sum and y may each be x or addend, with their strides.
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

// Rounds y for `consumer` into `rounded`, if they are not null. Within 3e-7 · ((|n| + 1/2) · |weight| + |bias|) of the
// exact result, n being the number that the weight multiplies. All instruction sets give the same bits.
void norm(const NormTask& task, const PackedWeight* consumer, const InputScale& scale, const RoundedRows* rounded,
          int rows, int threads);

}  // namespace dybit
