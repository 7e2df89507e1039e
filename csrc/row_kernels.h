// Functions of FP32 rows that every instruction set implements.
#pragma once

#include "attention.h"
#include "norm.h"

namespace dybit {

// The keys and values of a head in the layout of the products: [panel][head_size][keys of the panel] and
// [keys][padded value_size].
struct PackedHead {
  float* keys;
  float* values;
};

// All sets give the same bits.
struct RowKernels {
  void (*norm)(const NormTask&, int rows);  // y is not null
  void (*pack_head)(const AttentionTask&, int batch, int kv_head, const PackedHead&);
  // Rows of all query heads of a kv head, by query, then by head. The head is null if rows are few: head_size and
  // value_size are multiples of kLanes then.
  void (*attend)(const AttentionTask&, int batch, int kv_head, const PackedHead*, int first_row, int last_row);
};

}  // namespace dybit
