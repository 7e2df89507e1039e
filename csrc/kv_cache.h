// The keys and values of one attention layer for several sequences, and attention over them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace dybit {

struct CacheShape {
  int kv_heads, key_size, value_size;
};

// New tokens of a sequence. Strides are those of head and token, in elements; the numbers of a head are contiguous.
struct CacheRows {
  int sequence, count;
  const float *keys, *values;
  int64_t key_strides[2], value_strides[2];
};

// Queries of the last `count` tokens of a sequence. Token t sees the tokens from `start` (padding on the left) to t.
struct CacheQueries {
  int sequence, count, start;
  const float* q;
  int64_t q_strides[2];
  float* out;
  int64_t out_strides[2];
};

struct CacheAttention {
  int heads;  // query head h uses the keys and values of head h / (heads / kv_heads)
  float scale;
  int window = 0;      // a token sees so many tokens, itself included; 0: all
  float soft_cap = 0;  // scores become soft_cap · tanh(score / soft_cap); 0: they stay
};

// Tokens of all heads. Sequences share pages that neither of them changes any more.
struct CachePage {
  explicit CachePage(size_t bytes);

  uint8_t* data;  // aligned to 64 bytes, zero at first
  size_t bytes;

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

// Neither method locks: one thread at a time uses a cache. Sequences, lengths and indices are not checked.
class KVCache {
 public:
  explicit KVCache(const CacheShape& shape);

  const CacheShape& shape() const { return shape_; }
  int sequences() const { return int(sequences_.size()); }
  int length(int sequence) const { return sequences_[sequence].length; }
  size_t bytes() const;  // of the pages; a shared page counts once

  // Forgets everything; there are so many empty sequences afterwards.
  void reset(int sequences);
  // Adds tokens to sequences. Each sequence occurs at most once.
  void append(const CacheRows* rows, int count, int threads);
  // out = softmax(q · kᵀ · scale) · v. A query that sees no token gives zeros. All instruction sets give the same bits.
  void attend(const CacheQueries* queries, int count, const CacheAttention& attention, int threads) const;
  // Keeps the first `length` tokens of a sequence.
  void crop(int sequence, int length);
  // Sequence i becomes what sequence from[i] was. The number of sequences may change.
  void reorder(const std::vector<int>& from);
  // Writes keys (kv_heads, length, key_size) and values (kv_heads, length, value_size) of a sequence as FP32.
  void read(int sequence, float* keys, float* values) const;

 private:
  // Consecutive tokens of a sequence.
  struct Part {
    std::shared_ptr<CachePage> page;
    int count;
  };
  struct Sequence {
    std::vector<Part> parts;
    int length = 0;
  };

  CachePage& open_page(Sequence& sequence);  // with a place for a token, and of this sequence alone
  void append_floats(CachePage& page, int token, int count, const CacheRows& rows, int first) const;

  CacheShape shape_;
  int value_pitch_;  // floats of a token's value
  size_t key_head_, value_head_;  // floats of a head in a page
  std::vector<Sequence> sequences_;
};

}  // namespace dybit
