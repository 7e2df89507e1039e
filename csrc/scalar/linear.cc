// Linear layers without intrinsics: the reference. The other instruction sets give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "target.h"
#include "kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

#include "generic/linear.inc"

InputKind input_kind(Storage, int, int max_input, bool is_signed) {
  if (is_signed) return max_input <= 127 ? InputKind::kSigned8 : InputKind::kSigned16;
  return max_input <= 255 ? InputKind::kUnsigned8 : InputKind::kSigned16;
}

template <class T>
void linear_block(const Weight& w, const Input& in, const Output& out, int block) {
  static thread_local Scratch significand_memory;
  auto* const significands = significand_memory.take<int16_t>(kBlockRows * (kMaxSegment + kChunk));
  const T* x = static_cast<const T*>(in.data);
  const int rows = w.rows_of(block);
  for (int s = 0; s < w.segment_count; ++s) {
    const Segment& segment = w.segments[s];
    const int length = segment.chunks * kChunk;
    const bool last = s + 1 == w.segment_count;
    expand_plainly(w, block, s, significands);
    const float* scale = w.scales_at(block, s);
    for (int m = 0; m < in.rows; ++m) {
      const T* xs = x + (int64_t(m) * w.chunk_count + segment.chunk) * kChunk;
      const float group_scale = in.group_scales ? in.group_scales[int64_t(m) * w.segment_count + s] : 1.0f;
      float* y = out.data + m * out.stride + int64_t(block) * kBlockRows;
      for (int n = 0; n < rows; ++n) {
        const int16_t* row = significands + size_t(n) * length;
        int32_t sum = 0;
        for (int k = 0; k < length; ++k) sum += int32_t(xs[k]) * row[k];
        const float total = __builtin_fmaf(float(sum), scale[n] * group_scale, s ? y[n] : 0.0f);
        y[n] = last ? __builtin_fmaf(total, in.row_scales[m], out.bias[block * kBlockRows + n]) : total;
      }
    }
  }
}

struct FloatLanes {
  static constexpr int kCount = kBlockRows;
  float of[kCount];
  static FloatLanes load(const float* p) {
    FloatLanes lanes;
    std::memcpy(lanes.of, p, sizeof lanes.of);
    return lanes;
  }
  static FloatLanes broadcast(const float* p) {
    FloatLanes lanes;
    std::fill_n(lanes.of, kCount, *p);
    return lanes;
  }
  void store(float* p) const { std::memcpy(p, of, sizeof of); }
  void add_product(const FloatLanes& a, const FloatLanes& b) {
    for (int i = 0; i < kCount; ++i) of[i] = __builtin_fmaf(a.of[i], b.of[i], of[i]);
  }
};

constexpr int kFloatUnit = 1, kFloatTileRows = 1;

#include "generic/float_tile.inc"

void float_blocks(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  auto expand = [&](int block, int s, auto... rest) { expand_plainly(w, block, s, rest...); };
  if (in.rows > 1) return float_units_expanded(w, in, out, first_block, last_block, expand);
  float_linear(w, in, out, first_block, last_block, expand, [](const float* x, const auto* rows, int padded, float* d) {
    for (int n = 0; n < 4; ++n) d[n] = float_sum(x, rows + int64_t(n) * padded, padded);
  });
}

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.kind == InputKind::kFloat) return float_blocks(w, in, out, first_block, last_block);
  for (int block = first_block; block < last_block; ++block) {
    switch (in.kind) {
      case InputKind::kSigned8: linear_block<int8_t>(w, in, out, block); break;
      case InputKind::kUnsigned8: linear_block<uint8_t>(w, in, out, block); break;
      default: linear_block<int16_t>(w, in, out, block);
    }
  }
}

void dequantize(const Weight& w, float* out, int first_block, int last_block) {
  dequantize_blocks(w, out, first_block, last_block,
                    [&](int block, int s, auto* to) { expand_plainly(w, block, s, to); });
}

}  // namespace

const Kernels kScalar = {"scalar", 4, input_kind, linear,
                         dequantize, &kScalarCodes, &kScalarRows, nullptr};

}  // namespace dybit
