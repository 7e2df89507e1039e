// Codebooks without intrinsics: the reference (codes.h).
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "codes.h"
#include "conv_tasks.h"
#include "target.h"

namespace dybit {
namespace {

#include "generic/unroll.inc"

struct Indices {
  int32_t lane[kLanes];
  static Indices load_bytes(const uint8_t* p) {
    Indices result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = p[i];
    return result;
  }
  void store_bytes(uint8_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(lane[i]);
  }
  template <class T>
  void store_as(T* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = T(lane[i]);
  }
};

struct Lanes {
  float lane[kLanes];

  template <class F>
  static Lanes make(F&& f) {
    Lanes result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
    return result;
  }
  static Lanes load(const float* p) {
    return make([&](int i) { return p[i]; });
  }
  static Lanes fill(float x) {
    return make([&](int) { return x; });
  }
  static Lanes first(int count) {
    return make([&](int i) { return i < count ? 1.0f : 0.0f; });
  }
  void store(float* p) const { std::memcpy(p, lane, sizeof lane); }
  Lanes operator+(Lanes b) const {
    return make([&](int i) { return lane[i] + b.lane[i]; });
  }
  Lanes operator-(Lanes b) const {
    return make([&](int i) { return lane[i] - b.lane[i]; });
  }
  Lanes operator*(Lanes b) const {
    return make([&](int i) { return lane[i] * b.lane[i]; });
  }
  Lanes operator/(Lanes b) const {
    return make([&](int i) { return lane[i] / b.lane[i]; });
  }
  Lanes plus_product(Lanes b, Lanes c) const {
    return make([&](int i) { return __builtin_fmaf(lane[i], b.lane[i], c.lane[i]); });
  }
  Lanes minus_product(Lanes b, Lanes c) const {
    return make([&](int i) { return __builtin_fmaf(-lane[i], b.lane[i], c.lane[i]); });
  }
  // NaN stays NaN.
  Lanes at_least(Lanes low) const {
    return make([&](int i) { return lane[i] < low.lane[i] ? low.lane[i] : lane[i]; });
  }
  Lanes at_most(Lanes high) const {
    return make([&](int i) { return lane[i] > high.lane[i] ? high.lane[i] : lane[i]; });
  }
  // Integers, ties to even, of numbers below 2^22 in magnitude; of NaN any.
  Indices nearest() const {
    Indices result;
    for (int i = 0; i < kLanes; ++i) {
      const float moved = lane[i] + 12582912.0f;  // 1.5 · 2^23
      int32_t bits;
      std::memcpy(&bits, &moved, sizeof bits);
      result.lane[i] = int32_t(uint32_t(bits) - 0x4b400000u);
    }
    return result;
  }
  Lanes or_nan_of(Lanes b) const {
    return make([&](int i) { return b.lane[i] == b.lane[i] ? lane[i] : __builtin_nanf(""); });
  }
};

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

constexpr int kMixLanes = 4;
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kScalarCodes;
const CodeKernels kScalarCodes = kCodes;

}  // namespace dybit
