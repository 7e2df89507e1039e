// Functions of FP32 rows with NEON.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "row_kernels.h"
#include "target.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "neon_lanes.inc"

#include "generic/rows.inc"

}  // namespace

extern const RowKernels kNeonRows;
const RowKernels kNeonRows = kRows;

}  // namespace dybit
#endif
