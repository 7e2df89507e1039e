// Codebooks with AVX2 (codes.h). The first 3 levels of a search tree are in a register; the others are gathered.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "conv_tasks.h"
#include "scratch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "x86/avx2_lanes.inc"

template <int kSteps>
struct Tree {
  __m256 top;
  const float* tree;
  DYBIT_INLINE explicit Tree(const float* p) : top(_mm256_load_ps(p)), tree(p) {}
  DYBIT_INLINE Indices find(Lanes x) const {
    Indices result;
    unroll<2>([&](auto h) DYBIT_INLINE {
      __m256i node = _mm256_setzero_si256();  // in the whole tree
      unroll<kSteps>([&](auto step) DYBIT_INLINE {
        const __m256 boundary = step < 3 ? _mm256_permutevar8x32_ps(top, node) : _mm256_i32gather_ps(tree, node, 4);
        const __m256i below = _mm256_castps_si256(_mm256_cmp_ps(boundary, x.v[h], _CMP_LT_OQ));  // -1 where it is
        node = _mm256_sub_epi32(_mm256_add_epi32(_mm256_add_epi32(node, node), _mm256_set1_epi32(1)), below);
      });
      result.v[h] = _mm256_sub_epi32(node, _mm256_set1_epi32((1 << kSteps) - 1));
    });
    return result;
  }
};

template <int kSteps>
struct Table {
  __m256 low, high;  // of up to 16 entries
  const float* table;
  DYBIT_INLINE explicit Table(const float* p) : low(_mm256_setzero_ps()), high(low), table(p) {
    const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (kSteps < 3)
      low = _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << kSteps), places));
    else if constexpr (kSteps <= 4)
      low = _mm256_loadu_ps(p);
    if constexpr (kSteps == 4) high = _mm256_loadu_ps(p + 8);
  }
  DYBIT_INLINE Lanes at(Indices index) const {
    return Lanes::make([&](int h) DYBIT_INLINE {
      const __m256i i = index.v[h];
      if constexpr (kSteps > 4) return _mm256_i32gather_ps(table, i, 4);
      const __m256 first = _mm256_permutevar8x32_ps(low, i);
      if constexpr (kSteps < 4) return first;
      return _mm256_blendv_ps(first, _mm256_permutevar8x32_ps(high, i), _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    });
  }
};

#include "sum_bytes.inc"
#include "avx2_depthwise.inc"

constexpr bool kDivides = false;
constexpr int kMixLanes = 4;
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kAvx2Codes;
const CodeKernels kAvx2Codes = kCodes;

}  // namespace dybit
DYBIT_TARGET_END
#endif
