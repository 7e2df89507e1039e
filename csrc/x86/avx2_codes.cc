// Codebooks with AVX2 (codes.h). The first 3 levels of a search tree are in a register; the others are gathered.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "conv_tasks.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

#include "generic/unroll.inc"

struct Indices {
  __m256i v[2];
  DYBIT_INLINE static Indices load_bytes(const uint8_t* p) {
    return {{_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))}};
  }
  DYBIT_INLINE void store_bytes(uint8_t* p) const {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(v[0], v[1]), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  template <class T>
  DYBIT_INLINE void store_as(T* p) const {
    if constexpr (sizeof(T) == 1) {
      const __m256i byte = _mm256_set1_epi32(255);
      Indices{{_mm256_and_si256(v[0], byte), _mm256_and_si256(v[1], byte)}}.store_bytes(reinterpret_cast<uint8_t*>(p));
    } else {
      _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(v[0], v[1]), 0xd8));
    }
  }
};

struct Lanes {
  __m256 v[2];
  template <class F>
  DYBIT_INLINE static Lanes make(F&& f) {
    return {{f(0), f(1)}};
  }
  DYBIT_INLINE static Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  DYBIT_INLINE static Lanes fill(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  DYBIT_INLINE static Lanes first(int count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return make([&](int h) DYBIT_INLINE {
      const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8 * h), index);
      return _mm256_and_ps(_mm256_castsi256_ps(inside), _mm256_set1_ps(1.0f));
    });
  }
  DYBIT_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, v[0]);
    _mm256_storeu_ps(p + 8, v[1]);
  }
  DYBIT_INLINE Lanes operator+(Lanes b) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_add_ps(v[h], b.v[h]); });
  }
  DYBIT_INLINE Lanes operator-(Lanes b) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_sub_ps(v[h], b.v[h]); });
  }
  DYBIT_INLINE Lanes operator*(Lanes b) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_mul_ps(v[h], b.v[h]); });
  }
  DYBIT_INLINE Lanes operator/(Lanes b) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_div_ps(v[h], b.v[h]); });
  }
  DYBIT_INLINE Lanes plus_product(Lanes b, Lanes c) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_fmadd_ps(v[h], b.v[h], c.v[h]); });
  }
  DYBIT_INLINE Lanes minus_product(Lanes b, Lanes c) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_fnmadd_ps(v[h], b.v[h], c.v[h]); });
  }
  DYBIT_INLINE Lanes at_least(Lanes low) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_max_ps(low.v[h], v[h]); });
  }
  DYBIT_INLINE Lanes at_most(Lanes high) const {
    return make([&](int h) DYBIT_INLINE { return _mm256_min_ps(high.v[h], v[h]); });
  }
  DYBIT_INLINE Indices nearest() const { return {{_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])}}; }
  DYBIT_INLINE Lanes or_nan_of(Lanes b) const {
    return make([&](int h) DYBIT_INLINE {
      return _mm256_blendv_ps(v[h], _mm256_set1_ps(__builtin_nanf("")), _mm256_cmp_ps(b.v[h], b.v[h], _CMP_UNORD_Q));
    });
  }
};

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
  const float* table;
  DYBIT_INLINE explicit Table(const float* p) : table(p) {}
  DYBIT_INLINE Lanes at(Indices index) const {
    return Lanes::make([&](int h) DYBIT_INLINE { return _mm256_i32gather_ps(table, index.v[h], 4); });
  }
};

#include "sum_bytes.inc"

constexpr int kMixLanes = 4;
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kAvx2Codes;
const CodeKernels kAvx2Codes = kCodes;

}  // namespace dybit
DYBIT_TARGET_END
#endif
