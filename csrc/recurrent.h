// Recurrent layers after the product with their inputs: all steps in one call.
#pragma once

#include <cstdint>

#include "packed_weight.h"

namespace dybit {

enum class Cell : int { kLstm = 0, kGru, kTanh, kRelu };

// One direction of a layer. Gates are in torch's order. At step t the first counts[t] sequences are computed; the states
// of the others stay.
struct RecurrentTask {
  Cell cell;
  const PackedWeight* weight;  // (gates · size, size)
  const float* bias;           // [gates · size], or null
  InputScale scale;            // of the states
  int64_t steps;
  const int64_t* counts;  // [steps]
  bool reverse;           // from the last step on
  const float* x;         // [all counts][gates · size]: the products with the inputs, and their bias
  float *h, *c;           // [sequences][size]: states before, then after. c: LSTM only
  float* y;               // [all counts][size]: h after each step; or null
};

void recur(const RecurrentTask& task, int threads);

}  // namespace dybit
