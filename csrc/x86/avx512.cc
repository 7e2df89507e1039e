// Linear layers with AVX-512 VNNI. An instruction sums 64 products of bytes, or 32 of 16 bits, exactly in 32 bits.
//
// vpdpbusd multiplies unsigned by signed bytes. For signed inputs the weights are the unsigned operand: 128 is added to
// them, and 128 times the sum of the inputs is subtracted. For unsigned inputs the weights are the signed operand.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")
namespace dybit {
namespace {
namespace vbmi {

#define DYBIT_VBMI
#include "avx512.inc"
#undef DYBIT_VBMI

// For Storage::kRuns.
void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  const int64_t row_bytes = int64_t(w.chunk_count) * kChunk * element_bytes(in.kind);
  const Job job{w, in, out, nullptr, static_cast<const uint8_t*>(in.data), row_bytes, 0, nullptr};
  run<Storage::kRuns, Product::kSigned16>(job, first_block, last_block);
}

}  // namespace vbmi

bool has_vbmi() {
#if defined(__GNUC__) || defined(__clang__)
  return __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

}  // namespace
}  // namespace dybit
DYBIT_TARGET_END

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace dybit {
namespace {

#include "avx512.inc"

template <Product kP>
void run_any(const Job& job, int first_block, int last_block) {
  with_storage_for<kP == Product::kSigned16>(
      job.w.storage, [&](auto storage) { run<decltype(storage)::value, kP>(job, first_block, last_block); });
}

InputKind input_kind(Storage storage, int, int max_input, bool is_signed) {
  if (is_wide(storage) || max_input > (is_signed ? 127 : 255)) return InputKind::kSigned16;
  return is_signed ? InputKind::kSigned8 : InputKind::kUnsigned8;
}

#include "avx512_float.inc"

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.kind == InputKind::kFloat) return float_blocks(w, in, out, first_block, last_block);
  if (w.storage == Storage::kRuns && has_vbmi()) return vbmi::linear(w, in, out, first_block, last_block);
  alignas(64) int8_t tables[kMaxBooks * 16];
  const int bias = in.kind == InputKind::kSigned8 ? kBias : 0;
  bias_tables(w, bias, tables);
  const int64_t row_bytes = int64_t(w.chunk_count) * kChunk * element_bytes(in.kind);
  const Job job{w, in, out, tables, static_cast<const uint8_t*>(in.data), row_bytes, bias, in.segment_sums};
  switch (in.kind) {
    case InputKind::kSigned8: return run_any<Product::kSigned8>(job, first_block, last_block);
    case InputKind::kUnsigned8: return run_any<Product::kUnsigned8>(job, first_block, last_block);
    default: run_any<Product::kSigned16>(job, first_block, last_block);
  }
}

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;  // enough to hide the latency of an instruction
  __m512i sum[kChains], x = _mm512_set1_epi8(1);
  unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = _mm512_set1_epi32(i); });
  for (int64_t k = 0; k < count; ++k)
    unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = _mm512_dpbusd_epi32(sum[i], x, x); });
  unroll<kChains>([&](auto i) DYBIT_INLINE { x = _mm512_xor_si512(x, sum[i]); });
  return count * kChains * 64 + (_mm512_reduce_add_epi32(x) & 1);
}

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", kUnit, input_kind, linear,
                         dequantize, &kAvx512Codes, &kAvx512Rows, multiply, &kAvx512Panels};

}  // namespace dybit
DYBIT_TARGET_END
#endif
