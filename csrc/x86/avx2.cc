// Linear layers with AVX2, without AVX-VNNI: see avx2.inc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

constexpr bool kVnni = false;

#include "avx2.inc"

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", 1, input_kind, linear,
                       dequantize, &kAvx2Codes, &kAvx2Rows, multiply, &kAvx2Panels};

}  // namespace dybit
DYBIT_TARGET_END
#endif
