// The feed-forward part of a transformer: two or three linear layers with an activation between them.
#pragma once

#include "packed_weight.h"

namespace dybit {

// A weight and the other arguments of PackedWeight::linear besides the inputs.
struct Product {
  const PackedWeight* weight;
  const float* bias;
  const float* scale;
  const float* offset;
  float reach;
};

// y (rows, down's rows) = down(activation(first(x)) · second(x)), without the second factor if second is null. All are
// FP32 and contiguous. Gives the same bits as the products one by one.
void feed_forward(const Product& first, const Product* second, const Product& down, Activation activation,
                  const float* x, int64_t rows, float* y, int threads);

}  // namespace dybit
