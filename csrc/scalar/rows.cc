// Functions of FP32 rows without intrinsics: the reference. The other instruction sets give the same bits.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "row_kernels.h"
#include "scratch.h"
#include "target.h"

namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "scalar/lanes.inc"

constexpr int kTileLanes = 1, kTileSums = 6;
#include "generic/rows.inc"

}  // namespace

extern const RowKernels kScalarRows;
const RowKernels kScalarRows = kRows;

}  // namespace dybit
