// Functions of FP32 rows with NEON.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "row_kernels.h"
#include "scratch.h"
#include "target.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "neon_lanes.inc"

constexpr int kTileLanes = 1, kTileSums = 6;  // 6 sums in 24 registers
#include "generic/rows.inc"

}  // namespace

extern const RowKernels kNeonRows;
const RowKernels kNeonRows = kRows;

}  // namespace dybit
#endif
