// The keys and values of one attention layer for several sequences, and attention over them.
//
// Tokens lie in pages. A page that fills up is rounded to codes once enough newer tokens follow; until then its numbers are
// BF16. What has become codes never changes. Keys of a head lie by channel, [key_size][tokens of a page], and a group is
// the tokens of a channel; values lie by token, [tokens of a page][value_size], and a group is some channels of a token
// (the layout of KIVI, Liu et al., ICML 2024).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cache_codes.h"

namespace dybit {

struct CacheShape {
  int kv_heads, key_size, value_size;
};

struct CacheOptions {
  CacheFormat keys, values;
  int key_group = 32;    // tokens that share a scale, and of a page: 16, 32, 64 or 128
  int value_group = 64;  // most channels that share a scale: 16, 32, 64 or 128
  int residual = 0;      // newest tokens that stay BF16 even if their page is full
  bool rotate_keys = false, rotate_values = false;  // by a Hadamard matrix before they are rounded
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

// Keys or values: how a head is held in a page.
struct CacheSide {
  CacheFormat format;
  CacheBlock block;
  bool rotated;

  int open_bits() const { return format.bits == CacheFormat::kFloat ? CacheFormat::kFloat : CacheFormat::kHalf; }
  int bits(bool sealed) const { return sealed ? format.bits : open_bits(); }
  size_t bytes(int bits) const { return block.bytes(format, bits); }
};

// Tokens of all heads: the keys of every head, then the values. Sequences share pages that neither of them changes.
struct CachePage {
  explicit CachePage(size_t bytes);

  uint8_t* data;  // aligned to 64 bytes, zero at first, with 64 bytes behind its end
  size_t bytes;

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

// Neither method locks: one thread at a time uses a cache. Sequences, lengths and indices are not checked.
class KVCache {
 public:
  // Throws std::invalid_argument if an option is out of range.
  explicit KVCache(const CacheShape& shape, const CacheOptions& options = {});

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
    bool sealed;  // in the formats of the sides
  };
  struct Sequence {
    std::vector<Part> parts;
    int length = 0;
  };
  // New tokens on their way to a page.
  struct Arrival {
    CachePage* page;
    int token, count, first;
    const CacheRows* rows;
  };

  size_t values_at(bool sealed) const { return shape_.kv_heads * keys_.bytes(keys_.bits(sealed)); }
  size_t page_bytes(bool sealed) const {
    return values_at(sealed) + shape_.kv_heads * values_.bytes(values_.bits(sealed));
  }
  CachePage* open_page(Sequence& sequence) const;  // with a place for a token, and of this sequence alone
  void store(const Arrival& arrival, int head) const;
  void seal(const CacheRows* rows, int count, int threads);

  CacheShape shape_;
  CacheSide keys_, values_;
  int page_tokens_, residual_, value_pitch_;  // the pitch in numbers of a token's value
  std::vector<Sequence> sequences_;
};

}  // namespace dybit
