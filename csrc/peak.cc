#include "peak.h"

#include <atomic>
#include <cstring>

#include "dispatch.h"
#include "pool.h"
#include "target.h"

#if defined(_M_X64)
#include <immintrin.h>
#endif

namespace dybit {
namespace {

#include "generic/prefetch.inc"

}  // namespace

uint64_t read_all(const uint8_t* memory, size_t bytes, int threads) {
  constexpr size_t kPart = size_t(1) << 18;
  std::atomic<uint64_t> total{0};
  parallel_for(int(bytes / kPart), threads, [&](int part) {
    const uint8_t* from = memory + part * kPart;
    uint64_t sums[8] = {};
    for (size_t i = 0; i < kPart; i += 64) {
      fetch_ahead(from + i, 64);
      uint64_t words[8];
      std::memcpy(words, from + i, 64);
      for (int j = 0; j < 8; ++j) sums[j] += words[j];
    }
    for (uint64_t sum : sums) total += sum;
  });
  return total;
}

int64_t multiply_bytes(int64_t count, int threads) {
  if (!kernels().multiply) return 0;
  std::atomic<int64_t> products{0};
  parallel_for(threads, threads, [&](int) { products += kernels().multiply(count); });
  return products;
}

}  // namespace dybit
