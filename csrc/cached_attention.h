// What an instruction set gets to compute attention over a cache (kv_cache.h).
#pragma once

#include "kv_cache.h"

namespace dybit {

// Consecutive tokens in a page: keys and values of the first head. A page may have unused tokens at its end.
struct CachedPart {
  const uint8_t *keys, *values;
  int key_bits, value_bits;  // how they are held: as the side's format says, as BF16 or as FP32
  int count;
};

struct CachedTask {
  const CacheQueries* queries;
  const CacheAttention* attention;
  const CacheShape* shape;
  const CacheSide *keys, *values;
  int page_tokens;
  int length;  // tokens of all parts
  const CachedPart* parts;
  int part_count;
};

}  // namespace dybit
