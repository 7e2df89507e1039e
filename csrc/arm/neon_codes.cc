// Codebooks with NEON (codes.h). The first 5 levels of a search tree are in registers; the others are loaded one by
// one.
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

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "arm/neon_lanes.inc"

// 2^kSteps floats in registers, looked up byte by byte. Indices are those bytes: of a float i, 4·i … 4·i + 3.
template <int kSteps>
struct Floats {
  struct Two {
    uint8x16x4_t low, high;
  };
  using Few = std::conditional_t<kSteps <= 2, uint8x16_t, uint8x16x2_t>;
  using Many = std::conditional_t<kSteps == 4, uint8x16x4_t, Two>;
  std::conditional_t<kSteps <= 3, Few, Many> registers;

  DYBIT_INLINE explicit Floats(const float* p) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(p);
    if constexpr (kSteps == 1) registers = vcombine_u8(vld1_u8(bytes), vdup_n_u8(0));
    if constexpr (kSteps == 2) registers = vld1q_u8(bytes);
    if constexpr (kSteps == 3) registers = vld1q_u8_x2(bytes);
    if constexpr (kSteps == 4) registers = vld1q_u8_x4(bytes);
    if constexpr (kSteps == 5) registers = {vld1q_u8_x4(bytes), vld1q_u8_x4(bytes + 64)};
  }

  DYBIT_INLINE float32x4_t at(uint8x16_t bytes) const {
    uint8x16_t found;
    if constexpr (kSteps <= 2) found = vqtbl1q_u8(registers, bytes);
    if constexpr (kSteps == 3) found = vqtbl2q_u8(registers, bytes);
    if constexpr (kSteps == 4) found = vqtbl4q_u8(registers, bytes);
    if constexpr (kSteps == 5)  // vqtbx keeps what the first four registers gave
      found = vqtbx4q_u8(vqtbl4q_u8(registers.low, bytes), registers.high, vsubq_u8(bytes, vdupq_n_u8(64)));
    return vreinterpretq_f32_u8(found);
  }
};

// From an index in every byte of a lane, below 64, to those of the bytes of a float.
DYBIT_INLINE inline uint8x16_t float_bytes(uint8x16_t index) {
  return vsliq_n_u8(vreinterpretq_u8_u32(vdupq_n_u32(0x03020100)), index, 2);
}

DYBIT_INLINE inline float32x4_t gather(const float* p, uint32x4_t index) {
  float32x4_t result = vld1q_dup_f32(p + vgetq_lane_u32(index, 0));
  result = vld1q_lane_f32(p + vgetq_lane_u32(index, 1), result, 1);
  result = vld1q_lane_f32(p + vgetq_lane_u32(index, 2), result, 2);
  return vld1q_lane_f32(p + vgetq_lane_u32(index, 3), result, 3);
}

template <int kSteps>
struct Tree {
  const float* tree;
  float32x4_t root;
  Floats<1> second;
  Floats<2> third;
  Floats<3> fourth;
  Floats<4> fifth;

  DYBIT_INLINE explicit Tree(const float* p)
      : tree(p), root(vdupq_n_f32(p[0])), second(p + 1), third(p + 3), fourth(p + 7), fifth(p + 15) {}

  DYBIT_INLINE Indices find(Lanes x) const {
    Indices result;
    unroll<4>([&](auto q) DYBIT_INLINE {
      // Among those of its level, and in every byte of the lane; where a boundary is below, one is minus the mask.
      uint8x16_t node = vsubq_u8(vdupq_n_u8(0), vreinterpretq_u8_u32(vcltq_f32(root, x.v[q])));
      unroll<(kSteps < 5 ? kSteps : 5) - 1>([&](auto i) DYBIT_INLINE {
        float32x4_t boundary;
        const uint8x16_t bytes = float_bytes(node);
        if constexpr (i == 0) boundary = second.at(bytes);
        if constexpr (i == 1) boundary = third.at(bytes);
        if constexpr (i == 2) boundary = fourth.at(bytes);
        if constexpr (i == 3) boundary = fifth.at(bytes);
        node = vsubq_u8(vaddq_u8(node, node), vreinterpretq_u8_u32(vcltq_f32(boundary, x.v[q])));
      });
      uint32x4_t place = vshrq_n_u32(vreinterpretq_u32_u8(node), 24);
      if constexpr (kSteps > 5)
        unroll<kSteps - 5>([&](auto i) DYBIT_INLINE {
          const float32x4_t boundary = gather(tree + (32 << i) - 1, place);
          place = vsubq_u32(vaddq_u32(place, place), vcltq_f32(boundary, x.v[q]));
        });
      result.v[q] = place;
    });
    return result;
  }
};

template <int kSteps>
struct Table {
  const float* table;
  Floats<(kSteps < 5 ? kSteps : 5)> floats;
  DYBIT_INLINE explicit Table(const float* p) : table(p), floats(p) {}
  DYBIT_INLINE Lanes at(Indices index) const {
    return Lanes::make([&](int q) DYBIT_INLINE {
      if constexpr (kSteps > 5) return gather(table, index.v[q]);
      return floats.at(float_bytes(vreinterpretq_u8_u32(vmulq_n_u32(index.v[q], 0x01010101))));
    });
  }
};

// The sum of bytes; their number is a multiple of 32.
DYBIT_INLINE inline int32_t sum_of(const int8_t* values, int count) {
  int32x4_t sum = vdupq_n_s32(0);
  for (int k = 0; k < count; k += 32)
    sum = vpadalq_s16(sum, vpadalq_s8(vpaddlq_s8(vld1q_s8(values + k)), vld1q_s8(values + k + 16)));
  return vaddvq_s32(sum);
}

constexpr bool kDivides = false;
constexpr int kMixLanes = 1;  // sums of six units in 24 of 32 registers
#include "generic/plain_depthwise.inc"
#include "generic/codes.inc"

}  // namespace

extern const CodeKernels kNeonCodes;
const CodeKernels kNeonCodes = kCodes;

}  // namespace dybit
#endif
