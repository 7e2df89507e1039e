// Functions of FP32 rows that every instruction set implements.
#pragma once

#include "attention.h"
#include "cached_attention.h"
#include "elementwise.h"
#include "norm.h"

namespace dybit {

// The keys and values of a head in the layout of the products: [panel][head_size][keys of the panel] and
// [keys][padded value_size].
struct PackedHead {
  float* keys;
  float* values;
};

// y = a op b for rows of numbers. A step is 0 or 1.
struct BinaryRows {
  const float* a;
  int64_t a_stride, a_step;
  const float* b;
  int64_t b_stride, b_step;
  float* y;
  int64_t y_stride, rows, columns;
};

// Numbers of an image that make one output of each channel.
struct PoolBlock {
  const float* x;
  int rows, columns;
  int64_t row_stride, column_stride;
  int channels;
};

// Rows for a page of a cache: number [row][column] comes to place row · row_pitch + column · column_pitch.
struct StoredRows {
  const float* x;  // [rows][x_stride]
  int64_t x_stride;
  int rows, columns;
  int64_t row_pitch, column_pitch;
};

// All sets give the same bits.
struct RowKernels {
  void (*norm)(const NormTask&, int rows);  // y is not null
  void (*pack_head)(const AttentionTask&, int batch, int kv_head, const PackedHead&);
  // Rows of all query heads of a kv head, by query, then by head. The head is null if rows are few: head_size and
  // value_size are multiples of kLanes then.
  void (*attend)(const AttentionTask&, int batch, int kv_head, const PackedHead*, int first_row, int last_row);
  void (*unary)(Unary, const float* x, int64_t count, float* y);
  void (*clamp)(const float* x, int64_t count, float low, float high, float* y);
  void (*binary)(Binary, const BinaryRows&);
  void (*scale_columns)(const ColumnScales&, const float* x, int64_t rows, float* y);
  void (*fold_rows)(Fold, const float* x, int64_t stride, int64_t rows, int columns, float* y);
  void (*softmax)(const float* x, int64_t rows, int columns, float* y);
  void (*largest)(const PoolBlock&, float* y);
  void (*mean)(const PoolBlock&, float divisor, float* y);
  void (*attend_cached)(const CachedTask&, int kv_head, int first_row, int last_row);  // rows as those of attend
  // Rotary positions in place: numbers i and i + pairs of each head become x·cosine - y·sine and y·cosine + x·sine.
  void (*rotate)(float* x, int heads, int64_t head_stride, const float* cosine, const float* sine, int pairs);
  // Numbers of a block that is held in `bits`, those of the format or BF16. They are vectors · 16.
  void (*decode_cache)(const CacheFormat&, const CacheBlock&, int bits, const uint8_t* from, float* to);
  void (*encode_cache)(const CacheFormat&, const CacheBlock&, const float* from, uint8_t* to);
  void (*store_cache)(const StoredRows&, int bits, void* to);  // as FP32 or BF16
  // Multiplies rows by the normalized Hadamard matrix of the largest power of two that divides `size`, block by block.
  void (*hadamard)(float* rows, int count, int size, int64_t stride);
  // to[column][row] = from[row][column]
  void (*transpose)(const float* from, int64_t from_stride, int rows, int columns, float* to, int64_t to_stride);
  void (*encode)(const EncodeTask&, int first_row, int last_row);
  // Activation, factor and addend, in place; factor and addend are those of the first result.
  void (*finish)(const LinearFinish&, float* y, int64_t stride, int rows, int columns);
};

}  // namespace dybit
