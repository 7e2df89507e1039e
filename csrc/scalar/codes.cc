// Codebooks without intrinsics: the reference (codes.h).
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "conv_tasks.h"
#include "scratch.h"
#include "target.h"

namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "scalar/lanes.inc"

template <int kSteps>
struct Tree {
  const float* tree;
  explicit Tree(const float* p) : tree(p) {}
  Indices find(Lanes x) const {
    Indices result;
    for (int i = 0; i < kLanes; ++i) {
      int node = 0;
      for (int step = 0; step < kSteps; ++step) node = 2 * node + 1 + (tree[node] < x.lane[i]);
      result.lane[i] = node + 1 - (1 << kSteps);
    }
    return result;
  }
};

template <int kSteps>
struct Table {
  const float* table;
  explicit Table(const float* p) : table(p) {}
  Lanes at(Indices index) const {
    return Lanes::make([&](int i) { return table[index.lane[i]]; });
  }
};

// The sum of bytes; their number is a multiple of 32.
int32_t sum_of(const int8_t* values, int count) {
  int32_t sum = 0;
  for (int k = 0; k < count; ++k) sum += values[k];
  return sum;
}

constexpr bool kDivides = true;
constexpr int kMixLanes = 4;
#include "generic/plain_depthwise.inc"
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kScalarCodes;
const CodeKernels kScalarCodes = kCodes;

}  // namespace dybit
