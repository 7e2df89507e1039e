// Functions of FP32 rows with AVX-512.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "row_kernels.h"
#include "scratch.h"
#include "target.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "avx512_lanes.inc"

constexpr int kTileLanes = 4, kTileSums = 24;  // 6 × 4 sums, 4 vectors, 1 number
#include "generic/rows.inc"

}  // namespace

extern const RowKernels kAvx512Rows;
const RowKernels kAvx512Rows = kRows;

}  // namespace dybit
DYBIT_TARGET_END
#endif
