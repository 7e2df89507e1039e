// Products with unpacked weights, with AVX2, without AVX-VNNI: see avx2_panels.inc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "panel_kernels.h"
#include "target.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

constexpr bool kVnni = false;

#include "avx2_panels.inc"

}  // namespace

extern const PanelKernels kAvx2Panels;
const PanelKernels kAvx2Panels = {kUnit, kMostSums, run};

}  // namespace dybit
DYBIT_TARGET_END
#endif
