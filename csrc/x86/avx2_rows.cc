// Functions of FP32 rows with AVX2.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "row_kernels.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "avx2_lanes.inc"

constexpr int kTileLanes = 1, kTileSums = 6;  // 6 sums and 1 vector in 14 registers, 1 number
#include "generic/rows.inc"

}  // namespace

extern const RowKernels kAvx2Rows;
const RowKernels kAvx2Rows = kRows;

}  // namespace dybit
DYBIT_TARGET_END
#endif
