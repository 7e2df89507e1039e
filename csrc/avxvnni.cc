// AVX2 with AVX-VNNI, as processors have it that lack AVX-512: see avx2.inc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "weight.h"

#if defined(DYBIT_AVX_VNNI)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma,avxvnni")
namespace dybit {
namespace {

constexpr bool kVnni = true;
#define DYBIT_VNNI

#include "avx2.inc"

}  // namespace

extern const Kernels kAvxVnni;
const Kernels kAvxVnni = {"avxvnni", 1, input_kind, linear, encode, dequantize, activate, &kAvx2Codes, multiply};

}  // namespace dybit
DYBIT_TARGET_END
#endif
