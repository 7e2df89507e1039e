// Linear layers with NEON. "neon" runs on every 64-bit Arm processor: a few products of bytes are summed in 16 bits
// before they are widened. "neon-dot" sums 16 products of bytes exactly in 32 bits with one instruction, sdot or udot.
//
// Both operands of a product are signed, or both are not. For unsigned inputs, the largest magnitude of the weights is
// added to them, and as many times the sum of the inputs is subtracted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "scratch.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

#include "target.h"

namespace dybit {
namespace {
namespace plain {

constexpr bool kDot = false;
#include "neon.inc"

InputKind input_kind(Storage storage, int, int max_input, bool is_signed) {
  if (is_wide(storage) || max_input > (is_signed ? 127 : 255)) return InputKind::kSigned16;
  return is_signed ? InputKind::kSigned8 : InputKind::kUnsigned8;
}

#include "neon_float.inc"

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  switch (in.kind) {
    case InputKind::kSigned8: return linear_as<Product::kSigned8>(w, in, out, first_block, last_block);
    case InputKind::kUnsigned8: return linear_as<Product::kUnsigned8>(w, in, out, first_block, last_block);
    case InputKind::kSigned16: return linear_as<Product::kSigned16>(w, in, out, first_block, last_block);
    default: return float_blocks(w, in, out, first_block, last_block);
  }
}

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;  // enough to hide the latency of an instruction
  int16x8_t part[kChains];
  int8x8_t x = vdup_n_s8(1);
  unroll<kChains>([&](auto i) DYBIT_INLINE { part[i] = vdupq_n_s16(i); });
  for (int64_t k = 0; k < count; ++k)
    unroll<kChains>([&](auto i) DYBIT_INLINE { part[i] = vmlal_s8(part[i], x, x); });
  unroll<kChains>([&](auto i) DYBIT_INLINE { x = veor_s8(x, vmovn_s16(part[i])); });
  return count * kChains * 8 + (vget_lane_s8(x, 0) & 1);
}

}  // namespace plain
}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon",
                       1,
                       plain::input_kind,
                       plain::linear,
                       plain::dequantize,
                       &kNeonCodes,
                       &kNeonRows,
                       plain::multiply};

}  // namespace dybit

#if !defined(__ARM_FEATURE_DOTPROD)  // else the whole program assumes it, as on Apple's processors
DYBIT_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
namespace dybit {
namespace {
namespace dotted {

constexpr bool kDot = true;

template <bool kSigned>
DYBIT_INLINE inline int32x4_t dot(int32x4_t sum, uint8x16_t w, uint8x16_t x) {
  if constexpr (kSigned) return vdotq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x));
  return vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum), w, x));
}

// The word kLane of x for all four words of w.
template <bool kSigned, int kLane>
DYBIT_INLINE inline int32x4_t dot_lane(int32x4_t sum, uint8x16_t w, uint8x16_t x) {
  if constexpr (kSigned) return vdotq_laneq_s32(sum, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x), kLane);
  return vreinterpretq_s32_u32(vdotq_laneq_u32(vreinterpretq_u32_s32(sum), w, x, kLane));
}

#include "neon.inc"

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  switch (in.kind) {
    case InputKind::kSigned8: return linear_as<Product::kSigned8>(w, in, out, first_block, last_block);
    case InputKind::kUnsigned8: return linear_as<Product::kUnsigned8>(w, in, out, first_block, last_block);
    case InputKind::kSigned16:
      if (!is_wide(w.storage) && in.max_input <= 127 * 256 + 127)
        return linear_as<Product::kSplit16>(w, in, out, first_block, last_block);
      [[fallthrough]];
    default: plain::linear(w, in, out, first_block, last_block);
  }
}

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;
  int32x4_t sum[kChains];
  int8x16_t x = vdupq_n_s8(1);
  unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = vdupq_n_s32(i); });
  for (int64_t k = 0; k < count; ++k)
    unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = vdotq_s32(sum[i], x, x); });
  unroll<kChains>([&](auto i) DYBIT_INLINE { x = veorq_s8(x, vreinterpretq_s8_s32(sum[i])); });
  return count * kChains * 16 + (vgetq_lane_s8(x, 0) & 1);
}

}  // namespace dotted
}  // namespace

extern const Kernels kNeonDot;
const Kernels kNeonDot = {"neon-dot",
                          1,
                          plain::input_kind,
                          dotted::linear,
                          plain::dequantize,
                          &kNeonCodes,
                          &kNeonRows,
                          dotted::multiply};

}  // namespace dybit
#if !defined(__ARM_FEATURE_DOTPROD)
DYBIT_TARGET_END
#endif
#endif
