// The feed-forward part of a transformer: two or three products, with an activation between them. Must not know Python or
// torch.
#pragma once

#include "packed.h"

namespace dybit {

// A weight, and what PackedWeight::linear takes beside it and the inputs.
struct Product {
  const PackedWeight* weight;
  const float* bias;
  const float* scale;
  const float* offset;
  float reach;
};

// y (rows, down's rows) = down(activation(first(x)) · second(x)), without the second factor where second is null; all
// FP32 and contiguous. Bit for bit what the products give one by one.
void feed_forward(const Product& first, const Product* second, const Product& down, Activation activation,
                  const float* x, int64_t rows, float* y, int threads);

}  // namespace dybit
