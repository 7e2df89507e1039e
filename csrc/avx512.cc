// AVX-512 with VNNI: 64 products of bytes, or 32 of 16 bits, an instruction, summed exactly in 32 bits.
//
// vpdpbusd multiplies unsigned by signed bytes. For signed inputs the weights are the unsigned operand, biased by 128,
// and 128 times the sum of the inputs is subtracted; for unsigned inputs the weights are the signed operand as they are.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "weight.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>

#include "target.h"

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace dybit {
namespace {

#include "portable.inc"

constexpr int kUnit = 4;      // blocks whose unpacked weights are used together: 64 rows
constexpr int kTileRows = 6;  // input rows of a register tile: 6 × 4 sums, 4 weights, 1 input
constexpr int kFewRows = 4;   // up to so many input rows the weights are not unpacked but streamed
constexpr int kPanelBytes = 64 * kUnit * 1024;

enum class Product { kSigned8, kUnsigned8, kSigned16 };

#include "avx512_decode.inc"

#include "fetch.inc"

template <Product kP>
inline __m512i multiply_add(__m512i sum, __m512i w, __m512i x) {
  if constexpr (kP == Product::kSigned8) return _mm512_dpbusd_epi32(sum, w, x);
  if constexpr (kP == Product::kUnsigned8) return _mm512_dpbusd_epi32(sum, x, w);
  return _mm512_dpwssd_epi32(sum, w, x);
}

// The sums of the 16 rows, in order, from partial sums in lanes.
inline __m512i reduce(const __m512i a[4]) {
  __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
  __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
}

inline __m512 add_segment(const Job& job, __m512i sum, __m512 total, __m512 scale, int m, int s) {
  if (job.in.group_scales)
    scale = _mm512_mul_ps(scale, _mm512_set1_ps(job.in.group_scales[int64_t(m) * job.w.segment_count + s]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total);
}

inline void store_result(const Job& job, __m512 total, int m, int block) {
  const __m512 y = _mm512_fmadd_ps(total, _mm512_set1_ps(job.in.row_scales[m]),
                                   _mm512_loadu_ps(job.out.bias + block * kBlockRows));
  const int rows = job.w.rows - block * kBlockRows;
  const __mmask16 mask = rows >= kBlockRows ? 0xffff : __mmask16((1 << rows) - 1);
  _mm512_mask_storeu_ps(job.out.data + m * job.out.stride + block * kBlockRows, mask, y);
}

// One block of rows times kM input rows, the weights read once and in order.
template <int kStorage, Product kP, int kM>
void stream_block(const Job& job, int block, int m0) {
  const Weight& w = job.w;
  const uint8_t* p = w.codes + size_t(block) * w.chunk_count * w.chunk_bytes;
  __m512 total[kM];
  Tables<kStorage> table;
  unroll<kM>([&](auto m) DYBIT_INLINE { total[m] = _mm512_setzero_ps(); });
  for (int s = 0; s < w.segment_count; ++s) {
    const Segment& segment = w.segments[s];
    if (kHasTables<kStorage> && (s == 0 || w.choice_by_segment)) table.load(w, job.tables, job.choices(block, s));
    __m512i sum[kM][4];
    unroll<kM * 4>([&](auto i) DYBIT_INLINE { sum[i / 4][i % 4] = _mm512_setzero_si512(); });
    constexpr int kSize = kP == Product::kSigned16 ? 2 : 1;
    const uint8_t* x = job.x + m0 * job.x_stride + size_t(segment.chunk) * kChunk * kSize;
    for (int c = 0; c < segment.chunks; ++c, x += kChunk * kSize) {
      fetch_ahead(p, w.chunk_bytes);
      if constexpr (kStorage == kRuns) {  // multiplied as they are decoded: a whole chunk takes too many registers
        unroll<8>([&](auto i) DYBIT_INLINE {
          constexpr int s = i / 4, r = i % 4;
          __m512i even, odd;
          decode_runs(load512(p + 64 * i), table, r, even, odd);
          unroll<kM>([&](auto m) DYBIT_INLINE {
            auto xs = [&](int eighth) DYBIT_INLINE {
              return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + m * job.x_stride + 16 * eighth)));
            };
            sum[m][r] = multiply_add<kP>(multiply_add<kP>(sum[m][r], even, xs(2 * s)), odd, xs(2 * s + 1));
          });
        });
        p += w.chunk_bytes;
        continue;
      }
      constexpr int kParts = kSize == 2 ? 4 : 2;
      __m512i weights[kParts][4];
      if constexpr (kSize == 2)
        decode16<kStorage>(p, table, weights);
      else
        decode<kStorage, kP == Product::kSigned8 ? 128 : 0>(p, table, weights);
      unroll<kM * kParts>([&](auto mi) DYBIT_INLINE {
        constexpr int m = mi / kParts, i = mi % kParts;
        const __m512i xs = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(x + m * job.x_stride + 16 * i)));
        unroll<4>([&](auto r) DYBIT_INLINE { sum[m][r] = multiply_add<kP>(sum[m][r], weights[i][r], xs); });
      });
      p += w.chunk_bytes;
    }
    const __m512 scale = _mm512_loadu_ps(job.scales(block, s));
    unroll<kM>([&](auto m) DYBIT_INLINE {
      __m512i d = reduce(sum[m]);
      if (kP == Product::kSigned8) d = _mm512_sub_epi32(d, _mm512_set1_epi32(job.correction(m0 + m, s)));
      total[m] = add_segment(job, d, total[m], scale, m0 + m, s);
    });
  }
  unroll<kM>([&](auto m) DYBIT_INLINE { store_result(job, total[m], m0 + m, block); });
}

// Unpacks the segments first … last of a unit: panel[word of 4 bytes of columns][block][row], a word each.
template <int kStorage, Product kP>
void unpack_panel(const Job& job, int block0, int first, int last, uint8_t* panel) {
  const Weight& w = job.w;
  constexpr int kParts = kP == Product::kSigned16 ? 4 : 2;
  const int blocks = std::min(kUnit, w.blocks - block0);
  const int chunk0 = w.segments[first].chunk;
  for (int j = 0; j < blocks; ++j) {
    Tables<kStorage> table;
    for (int s = first; s < last; ++s) {
      const Segment& segment = w.segments[s];
      if (kHasTables<kStorage> && (s == first || w.choice_by_segment))
        table.load(w, job.tables, job.choices(block0 + j, s));
      const uint8_t* p = w.codes + (size_t(block0 + j) * w.chunk_count + segment.chunk) * w.chunk_bytes;
      uint8_t* to = panel + (size_t(segment.chunk - chunk0) * 4 * kParts * kUnit + j) * 64;
      for (int c = 0; c < segment.chunks; ++c, p += w.chunk_bytes) {
        __m512i weights[kParts][4];
        if constexpr (kParts == 4)
          decode16<kStorage>(p, table, weights);
        else
          decode<kStorage, kP == Product::kSigned8 ? 128 : 0>(p, table, weights);
        for (int i = 0; i < kParts; ++i) {
          transpose(weights[i]);
          for (int q = 0; q < 4; ++q, to += 64 * kUnit) _mm512_store_si512(to, weights[i][q]);
        }
      }
    }
  }
}

// Keeps a sum in its register: GCC would store every one of them in every step of the loop that they are made in.
DYBIT_INLINE inline void pin(__m512i& sum) {
#if defined(__GNUC__)
  asm("" : "+v"(sum));
#endif
}

// Adds a segment's sums of products, which begin with start[m], times their scales to total[m][j][row], over kM input rows
// and kBlocks blocks. Scales of the blocks lie `stride` times 16 apart, those of the inputs' groups, or null, `stride`.
template <Product kP, int kM, int kBlocks>
DYBIT_NOINLINE void add_words(const uint8_t* panel, const uint8_t* x, int64_t x_stride, int words, const int32_t* start,
                              const float* scales, const float* group_scales, int64_t stride, float* total) {
  __m512i sum[kM][kBlocks];
  unroll<kM * kBlocks>([&](auto i) DYBIT_INLINE { sum[i / kBlocks][i % kBlocks] = _mm512_set1_epi32(start[i / kBlocks]); });
  for (int k = 0; k < words; ++k, panel += 64 * kUnit, x += 4) {
    __m512i weights[kBlocks];
    unroll<kBlocks>([&](auto j) DYBIT_INLINE { weights[j] = _mm512_load_si512(panel + 64 * j); });
    unroll<kM>([&](auto m) DYBIT_INLINE {
      int32_t word;
      std::memcpy(&word, x + m * x_stride, 4);
      const __m512i xs = _mm512_set1_epi32(word);
      unroll<kBlocks>([&](auto j) DYBIT_INLINE {
        sum[m][j] = multiply_add<kP>(sum[m][j], weights[j], xs);
        pin(sum[m][j]);
      });
    });
  }
  unroll<kM * kBlocks>([&](auto i) DYBIT_INLINE {
    constexpr int m = i / kBlocks, j = i % kBlocks;
    __m512 scale = _mm512_loadu_ps(scales + j * stride * kBlockRows);
    if (group_scales) scale = _mm512_mul_ps(scale, _mm512_set1_ps(group_scales[m * stride]));
    float* place = total + i * kBlockRows;
    _mm512_store_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][j]), scale, _mm512_load_ps(place)));
  });
}

// kM input rows times kBlocks blocks of a panel. y holds the totals between panels.
template <Product kP, int kM, int kBlocks>
void tile(const Job& job, const uint8_t* panel, int block0, int first, int last, int m0) {
  const Weight& w = job.w;
  constexpr int kSize = kP == Product::kSigned16 ? 2 : 1;
  alignas(64) float total[kM][kBlocks][kBlockRows];
  auto mask = [&](int j) DYBIT_INLINE {
    const int rows = w.rows - (block0 + j) * kBlockRows;
    return rows >= kBlockRows ? __mmask16(0xffff) : __mmask16((1 << rows) - 1);
  };
  auto place = [&](int m, int j) DYBIT_INLINE {
    return job.out.data + (m0 + m) * job.out.stride + (block0 + j) * kBlockRows;
  };
  for (int m = 0; m < kM; ++m)
    for (int j = 0; j < kBlocks; ++j)
      _mm512_store_ps(total[m][j], first ? _mm512_maskz_loadu_ps(mask(j), place(m, j)) : _mm512_setzero_ps());
  const uint8_t* x = job.x + m0 * job.x_stride + size_t(w.segments[first].chunk) * kChunk * kSize;
  const float* group_scales = job.in.group_scales ? job.in.group_scales + int64_t(m0) * w.segment_count : nullptr;
  for (int s = first; s < last; ++s) {
    int32_t start[kM] = {};
    if (kP == Product::kSigned8)
      for (int m = 0; m < kM; ++m) start[m] = -job.correction(m0 + m, s);
    const int words = w.segments[s].chunks * kChunk * kSize / 4;
    add_words<kP, kM, kBlocks>(panel, x, job.x_stride, words, start, job.scales(block0, s),
                               group_scales ? group_scales + s : nullptr, w.segment_count, total[0][0]);
    panel += size_t(words) * 64 * kUnit;
    x += words * 4;
  }
  const bool ends = last == w.segment_count;
  unroll<kM * kBlocks>([&](auto i) DYBIT_INLINE {
    constexpr int m = i / kBlocks, j = i % kBlocks;
    __m512 y = _mm512_load_ps(total[m][j]);
    if (ends)
      y = _mm512_fmadd_ps(y, _mm512_set1_ps(job.in.row_scales[m0 + m]),
                          _mm512_loadu_ps(job.out.bias + (block0 + j) * kBlockRows));
    _mm512_mask_storeu_ps(place(m, j), mask(j), y);
  });
}

template <Product kP, int kBlocks>
void tiles(const Job& job, const uint8_t* panel, int block0, int first, int last) {
  int m = 0;
  for (; m + kTileRows <= job.in.rows; m += kTileRows)
    tile<kP, kTileRows, kBlocks>(job, panel, block0, first, last, m);
  switch (job.in.rows - m) {
    case 5: tile<kP, 5, kBlocks>(job, panel, block0, first, last, m); break;
    case 4: tile<kP, 4, kBlocks>(job, panel, block0, first, last, m); break;
    case 3: tile<kP, 3, kBlocks>(job, panel, block0, first, last, m); break;
    case 2: tile<kP, 2, kBlocks>(job, panel, block0, first, last, m); break;
    case 1: tile<kP, 1, kBlocks>(job, panel, block0, first, last, m); break;
    default: break;
  }
}

uint8_t* panel_memory() {
  static thread_local std::vector<uint8_t> memory(kPanelBytes * 2 + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

template <int kStorage, Product kP>
void run(const Job& job, int first_block, int last_block) {
  if (job.in.rows <= kFewRows) {
    for (int block = first_block; block < last_block; ++block) switch (job.in.rows) {
        case 1: stream_block<kStorage, kP, 1>(job, block, 0); break;
        case 2: stream_block<kStorage, kP, 2>(job, block, 0); break;
        case 3: stream_block<kStorage, kP, 3>(job, block, 0); break;
        case 4: stream_block<kStorage, kP, 4>(job, block, 0); break;
        default: break;
      }
    return;
  }
  const size_t chunk_panel = size_t(kChunk) * kUnit * kBlockRows * (kP == Product::kSigned16 ? 2 : 1);
  const int most = int(2 * kPanelBytes / chunk_panel);  // chunks; at least one segment
  uint8_t* panel = panel_memory();
  for (int block = first_block; block < last_block; block += kUnit)
    for (int first = 0, last; first < job.w.segment_count; first = last) {
      int chunks = 0;
      for (last = first; last < job.w.segment_count && chunks + job.w.segments[last].chunks <= most; ++last)
        chunks += job.w.segments[last].chunks;
      unpack_panel<kStorage, kP>(job, block, first, last, panel);
      switch (std::min(kUnit, last_block - block)) {
        case 1: tiles<kP, 1>(job, panel, block, first, last); break;
        case 2: tiles<kP, 2>(job, panel, block, first, last); break;
        case 3: tiles<kP, 3>(job, panel, block, first, last); break;
        default: tiles<kP, 4>(job, panel, block, first, last);
      }
    }
}

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
  const uint8_t* choices =
      w.choices + (size_t(block) * (w.choice_by_segment ? w.segment_count : 1) + (w.choice_by_segment ? s : 0)) * 16;
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

#include "avx512_float.inc"

void float_blocks(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  for (int block = first_block; block < last_block; ++block)
    for (int m = 0; m < in.rows; ++m) switch (w.storage) {
        case 2: float_block<2>(w, in, out, block, m); break;
        case 3: float_block<3>(w, in, out, block, m); break;
        case 4: float_block<4>(w, in, out, block, m); break;
        case 8: float_block<8>(w, in, out, block, m); break;
        case kRuns: float_block<kRuns>(w, in, out, block, m); break;
        default: float_block<16>(w, in, out, block, m);
      }
}

void dequantize(const Weight& w, float* out, int first_block, int last_block) {
  auto bytes = [&](int block, int s, int8_t* to) { expand(w, block, s, to); };
  auto words = [&](int block, int s, int16_t* to) { expand_plainly(w, block, s, to); };
  for (int block = first_block; block < last_block; ++block) {
    if (w.storage > 8)
      dequantize_block<int16_t>(w, out, block, words);
    else
      dequantize_block<int8_t>(w, out, block, bytes);
  }
}

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.kind == InputKind::kFloat) return float_blocks(w, in, out, first_block, last_block);
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
const Kernels kAvx512 = {"avx512", kUnit, input_kind, linear, encode, dequantize, &kAvx512Codes, multiply};

}  // namespace dybit
DYBIT_TARGET_END
#endif
