// Products with unpacked weights, with AVX2 and AVX-VNNI: see avx2_panels.inc.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "panel_kernels.h"
#include "target.h"

#if defined(DYBIT_AVX_VNNI)
#include <immintrin.h>

DYBIT_TARGET_BEGIN("avx2,fma,avxvnni")
namespace dybit {
namespace {

constexpr bool kVnni = true;
#define DYBIT_VNNI

#include "avx2_panels.inc"

}  // namespace

extern const PanelKernels kAvxVnniPanels;
const PanelKernels kAvxVnniPanels = {kUnit, kMostSums, run};

}  // namespace dybit
DYBIT_TARGET_END
#endif
