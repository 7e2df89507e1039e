// Functions of FP32 rows that every instruction set implements.
#pragma once

#include "norm.h"

namespace dybit {

// All sets give the same bits.
struct RowKernels {
  void (*norm)(const NormTask&, int rows);  // y is not null
};

}  // namespace dybit
