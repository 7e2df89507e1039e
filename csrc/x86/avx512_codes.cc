// Codebooks with AVX-512 (codes.h). Each level of a search tree is a look-up in registers.
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

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "x86/avx512_lanes.inc"

// Entry i < 16 · kRegisters of a table in registers: pairs by vpermt2ps, halves chosen by the bits above.
template <int kRegisters>
DYBIT_INLINE inline __m512 entry(const __m512* table, __m512i i) {
  if constexpr (kRegisters == 1) {
    return _mm512_permutexvar_ps(i, table[0]);
  } else if constexpr (kRegisters == 2) {
    return _mm512_permutex2var_ps(table[0], i, table[1]);
  } else {
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(8 * kRegisters));
    return _mm512_mask_blend_ps(upper, entry<kRegisters / 2>(table, i),
                                entry<kRegisters / 2>(table + kRegisters / 2, i));
  }
}

template <int kSteps>
struct Tree {
  __m512 level[kSteps <= 4 ? 1 : 1 << (kSteps - 4)];  // the first 4 levels; then each level in 1, 2, 4 … registers
  DYBIT_INLINE explicit Tree(const float* tree) {
    level[0] = _mm512_load_ps(tree);
    if constexpr (kSteps > 4)
      unroll<(1 << (kSteps - 4)) - 1>([&](auto i) DYBIT_INLINE { level[1 + i] = _mm512_loadu_ps(tree + 15 + 16 * i); });
  }
  DYBIT_INLINE Indices find(Lanes x) const {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i node = _mm512_setzero_si512();  // among those of its level
    unroll<kSteps>([&](auto step) DYBIT_INLINE {
      __m512 boundary;
      if constexpr (step < 4)
        boundary = _mm512_permutexvar_ps(_mm512_add_epi32(node, _mm512_set1_epi32((1 << step) - 1)), level[0]);
      else
        boundary = entry<1 << (step - 4)>(level + (1 << (step - 4)), node);
      node = _mm512_add_epi32(node, node);
      node = _mm512_mask_add_epi32(node, _mm512_cmp_ps_mask(boundary, x.v, _CMP_LT_OQ), node, one);
    });
    return {node};
  }
};

template <int kSteps>
struct Table {
  __m512 low[2];
  const float* table;
  DYBIT_INLINE explicit Table(const float* p) : table(p) {
    if constexpr (kSteps < 4) {
      low[0] = _mm512_maskz_loadu_ps(__mmask16((1 << (1 << kSteps)) - 1), p);
    } else {
      low[0] = _mm512_loadu_ps(p);
      if constexpr (kSteps == 5) low[1] = _mm512_loadu_ps(p + 16);
    }
  }
  DYBIT_INLINE Lanes at(Indices index) const {
    if constexpr (kSteps <= 4) return {entry<1>(low, index.v)};
    if constexpr (kSteps == 5) return {entry<2>(low, index.v)};
    return {_mm512_i32gather_ps(index.v, table, 4)};
  }
};

#include "sum_bytes.inc"
#include "avx512_depthwise.inc"

constexpr bool kDivides = false;
constexpr int kMixLanes = 4;
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kAvx512Codes;
const CodeKernels kAvx512Codes = kCodes;

}  // namespace dybit
DYBIT_TARGET_END
#endif
