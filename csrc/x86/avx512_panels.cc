// Products with unpacked weights, with AVX-512 VNNI.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "panel_kernels.h"
#include "target.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "avx512_lanes.inc"

constexpr int kUnit = 4, kTileRows = 6, kLessRows = 3;  // a tile has 6 × 4 sums, 4 weights and 1 input

template <InputKind kInputs>
struct Words {
  static constexpr InputKind kKind = kInputs;
};

using Sum = __m512i;
DYBIT_INLINE inline Sum load_sum(const int32_t* p) { return _mm512_loadu_si512(p); }
DYBIT_INLINE inline Lanes load_if(bool wanted, const float* p) {
  return {_mm512_maskz_loadu_ps(wanted ? 0xffff : 0, p)};
}
DYBIT_INLINE inline Lanes lanes_of(Sum sum) { return {_mm512_cvtepi32_ps(sum)}; }

template <class P, int kM, int kBlocks>
DYBIT_INLINE inline void add_words(const uint8_t* panel, const uint8_t* const* x, const int32_t* offsets, int words,
                                   int max_input, Sum (&sum)[kM][kBlocks]) {
  const __m512i added = _mm512_set1_epi8(char(max_input));
  for (int k = 0; k < words; ++k, panel += 64 * kBlocks) {
    const int64_t offset = offsets[k];
    __m512i weights[kBlocks];
    unroll<kBlocks>([&](auto j) DYBIT_INLINE { weights[j] = _mm512_load_si512(panel + 64 * j); });
    unroll<kM>([&](auto m) DYBIT_INLINE {
      int32_t word;
      std::memcpy(&word, x[m] + offset, 4);
      __m512i xs = _mm512_set1_epi32(word);
      if constexpr (P::kKind == InputKind::kSigned8) xs = _mm512_add_epi8(xs, added);
      unroll<kBlocks>([&](auto j) DYBIT_INLINE {
        if constexpr (P::kKind == InputKind::kSigned16)
          sum[m][j] = _mm512_dpwssd_epi32(sum[m][j], xs, weights[j]);
        else
          sum[m][j] = _mm512_dpbusd_epi32(sum[m][j], xs, weights[j]);
        DYBIT_PIN(sum[m][j]);
      });
    });
  }
}

#include "generic/panels.inc"

bool run(const Panels& panels, const InputRows& in, const Ending& ending, int first, int last) {
  switch (panels.kind) {
    case InputKind::kSigned8: return run_units<Words<InputKind::kSigned8>>(panels, in, ending, first, last);
    case InputKind::kUnsigned8: return run_units<Words<InputKind::kUnsigned8>>(panels, in, ending, first, last);
    default: return run_units<Words<InputKind::kSigned16>>(panels, in, ending, first, last);
  }
}

}  // namespace

extern const PanelKernels kAvx512Panels;
const PanelKernels kAvx512Panels = {kUnit, 1, run};

}  // namespace dybit
DYBIT_TARGET_END
#endif
