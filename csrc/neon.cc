// NEON. "neon" is that of every 64-bit Arm processor: products of bytes are summed in 16 bits, a few at a time, before
// they are widened. "neon-dot" sums 16 products of bytes exactly in 32 bits with one instruction, sdot or udot.
//
// Both operands of a product are signed or both are not: for unsigned inputs, weights are biased by their largest
// magnitude, and as many times the sum of the inputs is subtracted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "weight.h"

#if defined(__aarch64__) || defined(_M_ARM64)
#include <arm_neon.h>

#include "target.h"

namespace dybit {
namespace {
namespace plain {

constexpr bool kDot = false;
#include "neon.inc"

InputKind input_kind(int storage, int, int max_input, bool is_signed) {
  if (storage > 8 || max_input > (is_signed ? 127 : 255)) return InputKind::kSigned16;
  return is_signed ? InputKind::kSigned8 : InputKind::kUnsigned8;
}

// Expand for FP32 inputs and dequantize: row-major significands.
template <int kStorage, class T>
void expand_as(const Weight& w, int block, int s, int first, int count, T* out) {
  Tables<kStorage> tables;
  const Job job{w, {}, {}, w.tables, nullptr, 0, 0, nullptr};
  tables.load(w, w.tables, job.choices(block, s));
  unpack_rows<kStorage, sizeof(T) == 1 ? Product::kSigned8 : Product::kSigned16>(
      job.codes(block, s) + first * w.chunk_bytes, tables, vdupq_n_u8(0), count, reinterpret_cast<uint8_t*>(out));
}

void expand(const Weight& w, int block, int s, int first, int count, int8_t* out) {
  switch (w.storage) {
    case 2: return expand_as<2>(w, block, s, first, count, out);
    case 3: return expand_as<3>(w, block, s, first, count, out);
    case 4: return expand_as<4>(w, block, s, first, count, out);
    default: expand_as<8>(w, block, s, first, count, out);
  }
}

void expand(const Weight& w, int block, int s, int first, int count, int16_t* out) {
  if (w.storage == kRuns) return expand_as<kRuns>(w, block, s, first, count, out);
  expand_as<16>(w, block, s, first, count, out);
}

template <class T>
void expand(const Weight& w, int block, int s, T* out) {
  expand(w, block, s, 0, w.segments[s].chunks, out);
}

// 16 significands as floats.
DYBIT_INLINE inline void widen(int16x8_t low, int16x8_t high, float32x4_t out[4]) {
  out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  out[1] = vcvtq_f32_s32(vmovl_high_s16(low));
  out[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  out[3] = vcvtq_f32_s32(vmovl_high_s16(high));
}
DYBIT_INLINE inline void widen(const int8_t* p, float32x4_t out[4]) {
  const int8x16_t bytes = vld1q_s8(p);
  widen(vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes), out);
}
DYBIT_INLINE inline void widen(const int16_t* p, float32x4_t out[4]) { widen(vld1q_s16(p), vld1q_s16(p + 8), out); }

// float_sum of four rows, which share the loads of the input.
template <class T>
DYBIT_NOINLINE void float_sums(const float* x, const T* w, int padded, float* out) {
  float32x4_t sum[4][4];
  unroll<16>([&](auto i) DYBIT_INLINE { sum[i / 4][i % 4] = vdupq_n_f32(0); });
  for (int k = 0; k < padded; k += 16) {
    const float32x4_t xs[4] = {vld1q_f32(x + k), vld1q_f32(x + k + 4), vld1q_f32(x + k + 8), vld1q_f32(x + k + 12)};
    unroll<4>([&](auto n) DYBIT_INLINE {
      float32x4_t ws[4];
      widen(w + int64_t(n) * padded + k, ws);
      unroll<4>([&](auto i) DYBIT_INLINE { sum[n][i] = vfmaq_f32(sum[n][i], xs[i], ws[i]); });
    });
  }
  unroll<4>([&](auto n) DYBIT_INLINE {
    const float32x4_t four = vaddq_f32(vaddq_f32(sum[n][0], sum[n][2]), vaddq_f32(sum[n][1], sum[n][3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    out[n] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  });
}

struct FloatLanes {
  static constexpr int kCount = 4;
  float32x4_t of;
  DYBIT_INLINE static FloatLanes load(const float* p) { return {vld1q_f32(p)}; }
  DYBIT_INLINE static FloatLanes broadcast(const float* p) { return {vld1q_dup_f32(p)}; }
  DYBIT_INLINE void store(float* p) const { vst1q_f32(p, of); }
  DYBIT_INLINE void add_product(FloatLanes a, FloatLanes b) { of = vfmaq_f32(of, a.of, b.of); }
};

constexpr int kFloatUnit = 1, kFloatTileRows = 6;  // 24 sums, 4 weights, 1 input

#include "float_tile.inc"

void float_blocks(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  auto unpack = [&](int block, int s, auto... rest) { expand(w, block, s, rest...); };
  if (in.rows > 1) return float_units_expanded(w, in, out, first_block, last_block, unpack);
  auto sums = [](const float* x, const auto* rows, int padded, float* d) { float_sums(x, rows, padded, d); };
  float_linear(w, in, out, first_block, last_block, unpack, sums);
}

void dequantize(const Weight& w, float* out, int first_block, int last_block) {
  dequantize_blocks(w, out, first_block, last_block, [&](int block, int s, auto* to) { expand(w, block, s, to); });
}

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  switch (in.kind) {
    case InputKind::kSigned8: return linear_as<Product::kSigned8>(w, in, out, first_block, last_block);
    case InputKind::kUnsigned8: return linear_as<Product::kUnsigned8>(w, in, out, first_block, last_block);
    case InputKind::kSigned16: return linear_as<Product::kSigned16>(w, in, out, first_block, last_block);
    default: return float_blocks(w, in, out, first_block, last_block);
  }
}

void encode(const EncodeTask& task, int first_row, int last_row) { encode_rows(task, first_row, last_row); }

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;  // enough for what an instruction takes until its result is there
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
const Kernels kNeon = {"neon",        1,
                       plain::input_kind, plain::linear,
                       plain::encode,     plain::dequantize,
                       plain::activate,
                       &kNeonCodes,       plain::multiply};

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
      if (w.storage <= 8 && in.max_input <= 127 * 256 + 127)
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
const Kernels kNeonDot = {"neon-dot",        1,
                          plain::input_kind, dotted::linear,
                          plain::encode,     plain::dequantize,
                          plain::activate,
                          &kNeonCodes,       dotted::multiply};

}  // namespace dybit
#if !defined(__ARM_FEATURE_DOTPROD)
DYBIT_TARGET_END
#endif
#endif
