// What an instruction set gets to compute attention over a cache (kv_cache.h).
#pragma once

#include "kv_cache.h"

namespace dybit {

constexpr int kPageTokens = 64;

// Consecutive tokens: keys [kv head][key_size][kPageTokens] and values [kv head][kPageTokens][padded value_size].
struct CachedPart {
  const float *keys, *values;
  int count;
};

struct CachedTask {
  const CacheQueries* queries;
  const CacheAttention* attention;
  const CacheShape* shape;
  int length;  // tokens of all parts
  const CachedPart* parts;
  int part_count;
  size_t key_head, value_head;  // floats of a head
};

}  // namespace dybit
