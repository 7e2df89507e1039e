// Scaled dot-product attention in one pass over tiles: no matrix of scores in memory.
#pragma once

#include <cstdint>

namespace dybit {

// out = softmax(q · kᵀ · scale + mask) · v. All are FP32. Strides are those of batch, head and token, in elements; the
// numbers of a head are contiguous. Query head h uses the keys and values of head h / (heads / kv_heads).
struct AttentionTask {
  const float *q, *k, *v;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  int batch, heads, kv_heads, queries, keys, head_size, value_size;
  float scale;
  bool causal;               // query i sees keys 0 … i + causal_offset; 0 is torch's is_causal
  int causal_offset;         // keys - queries, if the queries are the last tokens
  const float* mask;         // added to scores; or null
  const uint8_t* bool_mask;  // a byte that is not 0 lets a key be seen; or null
  int64_t mask_strides[4];   // of batch, head, query and key; 0 to broadcast
  float* out;
  int64_t out_strides[3];
};

// A query that sees no key gives zeros, as in torch. All instruction sets give the same bits.
void attention(const AttentionTask& task, int threads);

}  // namespace dybit
