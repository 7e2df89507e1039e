// AVX-512 with VNNI: 64 products of bytes, or 32 of 16 bits, an instruction, summed exactly in 32 bits.
//
// vpdpbusd multiplies unsigned by signed bytes. For signed inputs the weights are the unsigned operand, biased by 128,
// and 128 times the sum of the inputs is subtracted; for unsigned inputs the weights are the signed operand as they are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "weight.h"

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

// Weights of storage kRuns.
void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  const Job job{w, in, out, nullptr, static_cast<const uint8_t*>(in.data), int64_t(w.chunk_count) * kChunk * 2};
  run<kRuns, Product::kSigned16>(job, first_block, last_block);
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
void run_storage(const Job& job, int first_block, int last_block) {
  switch (job.w.storage) {
    case 2: run<2, kP>(job, first_block, last_block); break;
    case 3: run<3, kP>(job, first_block, last_block); break;
    case 4: run<4, kP>(job, first_block, last_block); break;
    case 8: run<8, kP>(job, first_block, last_block); break;
    case kRuns:
      if constexpr (kP == Product::kSigned16) run<kRuns, kP>(job, first_block, last_block);
      break;
    default:
      if constexpr (kP == Product::kSigned16) run<16, kP>(job, first_block, last_block);
  }
}

InputKind input_kind(int storage, int, int max_input, bool is_signed) {
  if (storage > 8 || max_input > (is_signed ? 127 : 255)) return InputKind::kSigned16;
  return is_signed ? InputKind::kSigned8 : InputKind::kUnsigned8;
}

// Expand for FP32 inputs and dequantize: row-major significands.
template <int kStorage>
void expand8(const Weight& w, int block, int s, int8_t* out) {
  const Segment& segment = w.segments[s];
  const uint8_t* choices = w.choices_at(block, s);
  __m512i table[4] = {};
  if (kStorage < 8) load_tables(w.tables, choices, table);
  const int64_t stride = int64_t(segment.chunks) * kChunk;
  const uint8_t* p = w.codes + (size_t(block) * w.chunk_count + segment.chunk) * w.chunk_bytes;
  for (int c = 0; c < segment.chunks; ++c, p += w.chunk_bytes) {
    __m512i bytes[2][4];
    decode<kStorage, 0>(p, table, bytes);
    for (int i = 0; i < 2; ++i)
      for (int r = 0; r < 4; ++r) {
        int8_t* to = out + r * stride + c * kChunk + 16 * i;
        _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(bytes[i][r]));
        _mm_storeu_si128((__m128i*)(to + 4 * stride), _mm512_extracti32x4_epi32(bytes[i][r], 1));
        _mm_storeu_si128((__m128i*)(to + 8 * stride), _mm512_extracti32x4_epi32(bytes[i][r], 2));
        _mm_storeu_si128((__m128i*)(to + 12 * stride), _mm512_extracti32x4_epi32(bytes[i][r], 3));
      }
  }
}

void expand(const Weight& w, int block, int s, int8_t* out) {
  switch (w.storage) {
    case 2: expand8<2>(w, block, s, out); break;
    case 3: expand8<3>(w, block, s, out); break;
    case 4: expand8<4>(w, block, s, out); break;
    default: expand8<8>(w, block, s, out);
  }
}

template <int kStorage>
void expand16(const Weight& w, int block, int s, int16_t* out) {
  const Segment& segment = w.segments[s];
  Tables<kStorage> table;
  if (kHasTables<kStorage>) table.load(w, w.tables, w.choices_at(block, s));
  const int64_t stride = int64_t(segment.chunks) * kChunk;
  const uint8_t* p = w.codes + (size_t(block) * w.chunk_count + segment.chunk) * w.chunk_bytes;
  for (int c = 0; c < segment.chunks; ++c, p += w.chunk_bytes, out += kChunk) {
    __m512i words[4][4];
    decode16<kStorage>(p, table, words);
    unroll<16>([&](auto i) DYBIT_INLINE {
      int16_t* to = out + i % 4 * stride + i / 4 * 8;
      _mm_storeu_si128((__m128i*)to, _mm512_castsi512_si128(words[i / 4][i % 4]));
      _mm_storeu_si128((__m128i*)(to + 4 * stride), _mm512_extracti32x4_epi32(words[i / 4][i % 4], 1));
      _mm_storeu_si128((__m128i*)(to + 8 * stride), _mm512_extracti32x4_epi32(words[i / 4][i % 4], 2));
      _mm_storeu_si128((__m128i*)(to + 12 * stride), _mm512_extracti32x4_epi32(words[i / 4][i % 4], 3));
    });
  }
}

void expand(const Weight& w, int block, int s, int16_t* out) {
  w.storage == kRuns ? expand16<kRuns>(w, block, s, out) : expand16<16>(w, block, s, out);
}

#include "avx512_float.inc"

void float_blocks(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.rows > 1) return float_many(w, in, out, first_block, last_block);
  alignas(64) float tables[kMaxBooks][16];
  if (w.storage <= 4)
    for (int i = 0; i < kMaxBooks * 16; ++i) tables[i / 16][i % 16] = w.tables[i];
  with_storage(w.storage, [&](auto storage) {
    for (int block = first_block; block < last_block; ++block) {
      if constexpr (storage <= 4)
        float_block_by_table<storage>(w, in, out, block, tables);
      else
        float_block<storage>(w, in, out, block);
    }
  });
}

void dequantize(const Weight& w, float* out, int first_block, int last_block) {
  dequantize_blocks(w, out, first_block, last_block, [&](int block, int s, auto* to) { expand(w, block, s, to); });
}

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.kind == InputKind::kFloat) return float_blocks(w, in, out, first_block, last_block);
  if (w.storage == kRuns && has_vbmi()) return vbmi::linear(w, in, out, first_block, last_block);
  alignas(64) int8_t tables[kMaxBooks * 16];
  const int bias = in.kind == InputKind::kSigned8 ? 128 : 0;
  for (int i = 0; i < kMaxBooks * 16; ++i) tables[i] = int8_t(w.tables[i] + bias);
  const int64_t size = in.kind == InputKind::kSigned16 ? 2 : 1;
  const Job job{w, in, out, tables, static_cast<const uint8_t*>(in.data), int64_t(w.chunk_count) * kChunk * size};
  switch (in.kind) {
    case InputKind::kSigned8: run_storage<Product::kSigned8>(job, first_block, last_block); break;
    case InputKind::kUnsigned8: run_storage<Product::kUnsigned8>(job, first_block, last_block); break;
    default: run_storage<Product::kSigned16>(job, first_block, last_block);
  }
}

void encode(const EncodeTask& task, int first_row, int last_row) { encode_rows(task, first_row, last_row); }

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;  // enough for what an instruction takes until its result is there
  __m512i sum[kChains], x = _mm512_set1_epi8(1);
  unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = _mm512_set1_epi32(i); });
  for (int64_t k = 0; k < count; ++k)
    unroll<kChains>([&](auto i) DYBIT_INLINE { sum[i] = _mm512_dpbusd_epi32(sum[i], x, x); });
  unroll<kChains>([&](auto i) DYBIT_INLINE { x = _mm512_xor_si512(x, sum[i]); });
  return count * kChains * 64 + (_mm512_reduce_add_epi32(x) & 1);
}

}  // namespace

extern const Kernels kAvx512;
const Kernels kAvx512 = {"avx512", kUnit, input_kind, linear, encode, dequantize, activate, &kAvx512Codes, multiply};

}  // namespace dybit
DYBIT_TARGET_END
#endif
