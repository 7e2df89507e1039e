// Linear layers with AVX2 and AVX-VNNI, which some processors without AVX-512 have: see avx2.inc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "scratch.h"

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
const Kernels kAvxVnni = {"avxvnni", 1, input_kind, linear,
                          dequantize, &kAvx2Codes, &kAvx2Rows, multiply, &kAvxVnniPanels};

}  // namespace dybit
DYBIT_TARGET_END
#endif
