// AVX2: products of bytes are summed in pairs in 16 bits by vpmaddubsw, and a few such pairs before they are widened.
//
// How many, safe_sums says: weights are biased by their largest magnitude a (so 0 … 2a) for signed inputs of at most b,
// and the worst pair is 2 · 2a · b; unsigned inputs take weights as they are, 2 · a · b. Where not even one pair fits
// 16 bits, both sides are held as 16 bits and vpmaddwd sums in 32.
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

DYBIT_TARGET_BEGIN("avx2,fma")
namespace dybit {
namespace {

#include "portable.inc"

#include "fetch.inc"

constexpr int kTileRows = 4;  // input rows of a register tile: 4 × 2 sums of 8 rows of weights
constexpr int kPanelBytes = 16 * 4096 * 2;

enum class Product { kSigned8, kUnsigned8, kSigned16 };

int safe_sums(int max_weight, int max_input, bool input_is_signed) {
  const int pair = 2 * max_weight * (input_is_signed ? 2 : 1) * max_input;
  const bool fits = 2 * max_weight <= 255 || !input_is_signed;
  return fits && pair > 0 ? 32767 / pair : fits ? 4 : 0;
}

InputKind input_kind(int storage, int max_weight, int max_input, bool is_signed) {
  const bool bytes = storage <= 8 && max_input <= (is_signed ? 127 : 255);
  if (!bytes || safe_sums(max_weight, max_input, is_signed) < 1) return InputKind::kSigned16;
  return is_signed ? InputKind::kSigned8 : InputKind::kUnsigned8;
}

inline __m256i load256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// tables[h][r]: those of rows 8h + r and 8h + 4 + r.
inline void load_tables(const int8_t* tables, const uint8_t* choices, __m256i out[2][4]) {
  for (int h = 0; h < 2; ++h)
    for (int r = 0; r < 4; ++r) {
      const __m128i low = _mm_load_si128((const __m128i*)(tables + 16 * choices[8 * h + r]));
      const __m128i high = _mm_load_si128((const __m128i*)(tables + 16 * choices[8 * h + 4 + r]));
      out[h][r] = _mm256_set_m128i(high, low);
    }
}

// The significands of the rows of half h and register r, columns 16·s …: bytes, biased for storage 8 if asked for.
template <int kStorage>
DYBIT_INLINE inline __m256i decode(const uint8_t* p, __m256i table, __m256i bias, int h, int r, int s) {
  p += 32 * h;
  if constexpr (kStorage == 4) {
    const __m256i codes = _mm256_srli_epi16(load256(p + 64 * r), 4 * s);
    return _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)));
  } else if constexpr (kStorage == 8) {
    return _mm256_add_epi8(load256(p + (4 * s + r) * 64), bias);
  } else {
    const __m256i codes = _mm256_srli_epi16(load256(p + r / 2 * 64), r % 2 * 4 + s * 2);
    __m256i index = _mm256_and_si256(codes, _mm256_set1_epi8(3));
    if constexpr (kStorage == 3) {
      const __m256i plane = load256(p + 128);
      const int bit = r * 2 + s;
      const __m256i moved = bit < 2 ? _mm256_slli_epi16(plane, 2 - bit) : _mm256_srli_epi16(plane, bit < 2 ? 0 : bit - 2);
      index = _mm256_or_si256(index, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
    }
    return _mm256_shuffle_epi8(table, index);
  }
}

// Significands by code of rows 8h + r and 8h + 4 + r; for kRuns all tables of Runs in their order.
template <int kStorage>
struct Tables {
  __m256i of[2][4] = {};
  void load(const Weight&, const int8_t* tables, const uint8_t* choices) { load_tables(tables, choices, of); }
};

template <>
struct Tables<kRuns> {
  alignas(32) int8_t entries[2][4][7][32];

  void load(const Weight& w, const int8_t*, const uint8_t* choices) {
    for (int row = 0; row < kBlockRows; ++row) {
      const int8_t* from = w.runs[choices[row]].step;
      for (int i = 0; i < 7; ++i)
        _mm_store_si128((__m128i*)(entries[row / 8][row % 4][i] + row / 4 % 2 * 16),
                        _mm_load_si128((const __m128i*)(from + 16 * i)));
    }
  }
};

template <int kStorage>
constexpr bool kHasTables = kStorage < 8 || kStorage == kRuns;

// Significands of 16 bits from 32 indices into Runs: of the even bytes, then of the odd ones.
DYBIT_INLINE inline void decode_runs(__m256i index, const int8_t (*tables)[32], __m256i& even, __m256i& odd) {
  auto look = [&](int i, __m256i at) DYBIT_INLINE {
    return _mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)tables[i]), at);
  };
  const __m256i h = _mm256_and_si256(_mm256_srli_epi16(index, 4), _mm256_set1_epi8(15));
  // Their low four bits where the run is the top or bottom one; else negative, for which vpshufb gives zero.
  static_assert(Runs::kTop == 7 && Runs::kBottom == 15);
  const __m256i far = _mm256_set1_epi8(7 << 4);
  const __m256i top = _mm256_subs_epi8(index, far);
  const __m256i bottom = _mm256_subs_epi8(_mm256_xor_si256(index, _mm256_set1_epi8(char(0x80))), far);
  const __m256i step = look(0, h);
  const __m256i low = _mm256_or_si256(look(1, h), _mm256_or_si256(look(3, top), look(5, bottom)));
  const __m256i high = _mm256_or_si256(look(2, h), _mm256_or_si256(look(4, top), look(6, bottom)));
  const __m256i low8 = _mm256_set1_epi16(255);
  even = _mm256_add_epi16(_mm256_or_si256(_mm256_and_si256(low, low8), _mm256_slli_epi16(high, 8)),
                          _mm256_maddubs_epi16(_mm256_and_si256(index, _mm256_set1_epi16(15)), step));
  odd = _mm256_add_epi16(_mm256_or_si256(_mm256_srli_epi16(low, 8), _mm256_andnot_si256(low8, high)),
                         _mm256_maddubs_epi16(_mm256_and_si256(index, _mm256_set1_epi16(15 << 8)), step));
}

// The same as 16 bits: w[i] of columns 8·i ….
template <int kStorage>
DYBIT_INLINE inline void decode16(const uint8_t* p, const Tables<kStorage>& tables, int h, int r, __m256i w[4]) {
  if constexpr (kStorage == 16) {
    for (int i = 0; i < 4; ++i) w[i] = load256(p + (4 * i + r) * 64 + 32 * h);
  } else if constexpr (kStorage == kRuns) {
    for (int s = 0; s < 2; ++s)
      decode_runs(load256(p + (4 * s + r) * 64 + 32 * h), tables.entries[h][r], w[2 * s], w[2 * s + 1]);
  } else {
    for (int s = 0; s < 2; ++s) {
      const __m256i bytes = decode<kStorage>(p, tables.of[h][r], _mm256_setzero_si256(), h, r, s);
      w[2 * s] = _mm256_srai_epi16(_mm256_unpacklo_epi8(bytes, bytes), 8);
      w[2 * s + 1] = _mm256_srai_epi16(_mm256_unpackhi_epi8(bytes, bytes), 8);
    }
  }
}

template <Product kP>
inline __m256i multiply(__m256i w, __m256i x) {
  if constexpr (kP == Product::kSigned8) return _mm256_maddubs_epi16(w, x);
  if constexpr (kP == Product::kUnsigned8) return _mm256_maddubs_epi16(x, w);
  return _mm256_madd_epi16(w, x);
}

inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// As in avx512.cc, for 8 rows.
inline void transpose(__m256i a[4]) {
  __m256i t0 = _mm256_unpacklo_epi32(a[0], a[1]), t1 = _mm256_unpacklo_epi32(a[2], a[3]);
  __m256i t2 = _mm256_unpackhi_epi32(a[0], a[1]), t3 = _mm256_unpackhi_epi32(a[2], a[3]);
  a[0] = _mm256_unpacklo_epi64(t0, t1);
  a[1] = _mm256_unpackhi_epi64(t0, t1);
  a[2] = _mm256_unpacklo_epi64(t2, t3);
  a[3] = _mm256_unpackhi_epi64(t2, t3);
}

inline __m256i reduce(const __m256i a[4]) {
  __m256i s01 = _mm256_add_epi32(_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]));
  __m256i s23 = _mm256_add_epi32(_mm256_unpacklo_epi32(a[2], a[3]), _mm256_unpackhi_epi32(a[2], a[3]));
  return _mm256_add_epi32(_mm256_unpacklo_epi64(s01, s23), _mm256_unpackhi_epi64(s01, s23));
}

struct Job {
  const Weight& w;
  const Input& in;
  const Output& out;
  const int8_t* tables;
  const uint8_t* x;
  int64_t x_stride;  // bytes
  int bias;
  const int32_t* corrections = nullptr;

  const uint8_t* choices(int block, int s) const {
    return w.choices + (size_t(block) * (w.choice_by_segment ? w.segment_count : 1) + (w.choice_by_segment ? s : 0)) * 16;
  }
  const float* scales(int block, int s) const { return w.scales + (size_t(block) * w.segment_count + s) * kBlockRows; }
  int32_t correction(int m, int s) const { return bias * in.segment_sums[int64_t(m) * w.segment_count + s]; }
};

inline __m256 add_segment(const Job& job, __m256i sum, __m256 total, __m256 scale, int m, int s) {
  if (job.in.group_scales)
    scale = _mm256_mul_ps(scale, _mm256_set1_ps(job.in.group_scales[int64_t(m) * job.w.segment_count + s]));
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, total);
}

// Totals of 16 rows to y; the last ones with scale and bias.
inline void store_totals(const Job& job, const float* total, int m, int block, bool ends) {
  const int rows = std::min(kBlockRows, job.w.rows - block * kBlockRows);
  float* y = job.out.data + m * job.out.stride + block * kBlockRows;
  const float* bias = job.out.bias + block * kBlockRows;
  const float scale = job.in.row_scales[m];
  for (int n = 0; n < rows; ++n) y[n] = ends ? __builtin_fmaf(total[n], scale, bias[n]) : total[n];
}

// One block of rows times one input row, the weights read once and in order.
template <int kStorage, Product kP, bool kTwo>
void stream_block(const Job& job, int block) {
  const Weight& w = job.w;
  const uint8_t* p = w.codes + size_t(block) * w.chunk_count * w.chunk_bytes;
  alignas(32) float total[kBlockRows] = {};
  Tables<kStorage> tables;
  const __m256i bias = _mm256_set1_epi8(char(job.bias));
  constexpr int kSize = kP == Product::kSigned16 ? 2 : 1;
  for (int s = 0; s < w.segment_count; ++s) {
    const Segment& segment = w.segments[s];
    if (kHasTables<kStorage> && (s == 0 || w.choice_by_segment)) tables.load(w, job.tables, job.choices(block, s));
    __m256i sum[2][4];
    unroll<8>([&](auto i) DYBIT_INLINE { sum[i / 4][i % 4] = _mm256_setzero_si256(); });
    const uint8_t* x = job.x + size_t(segment.chunk) * kChunk * kSize;
    for (int c = 0; c < segment.chunks; ++c, x += kChunk * kSize, p += w.chunk_bytes) {
      fetch_ahead(p, w.chunk_bytes);
      __m256i xs[2 * kSize];
      unroll<2 * kSize>([&](auto i) DYBIT_INLINE {
        xs[i] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)(x + 16 * i)));
      });
      unroll<8>([&](auto hr) DYBIT_INLINE {
        constexpr int h = hr / 4, r = hr % 4;
        if constexpr (kP == Product::kSigned16) {
          __m256i weights[4];
          decode16<kStorage>(p, tables, h, r, weights);
          unroll<4>([&](auto i) DYBIT_INLINE {
            sum[h][r] = _mm256_add_epi32(sum[h][r], multiply<kP>(weights[i], xs[i]));
          });
        } else {
          const __m256i a = multiply<kP>(decode<kStorage>(p, tables.of[h][r], bias, h, r, 0), xs[0]);
          const __m256i b = multiply<kP>(decode<kStorage>(p, tables.of[h][r], bias, h, r, 1), xs[1]);
          const __m256i both = kTwo ? widen(_mm256_add_epi16(a, b)) : _mm256_add_epi32(widen(a), widen(b));
          sum[h][r] = _mm256_add_epi32(sum[h][r], both);
        }
      });
    }
    const float* scale = job.scales(block, s);
    unroll<2>([&](auto h) DYBIT_INLINE {
      __m256i d = reduce(sum[h]);
      if (kP == Product::kSigned8) d = _mm256_sub_epi32(d, _mm256_set1_epi32(job.correction(0, s)));
      float* t = total + 8 * h;
      _mm256_store_ps(t, add_segment(job, d, _mm256_load_ps(t), _mm256_loadu_ps(scale + 8 * h), 0, s));
    });
  }
  store_totals(job, total, 0, block, true);
}

// Unpacks the segments first … last of a block: panel[word of 4 bytes of columns][row], a word each.
template <int kStorage, Product kP>
void unpack_panel(const Job& job, int block, int first, int last, uint8_t* panel) {
  const Weight& w = job.w;
  constexpr int kParts = kP == Product::kSigned16 ? 4 : 2;
  const __m256i bias = _mm256_set1_epi8(char(job.bias));
  Tables<kStorage> tables;
  for (int s = first; s < last; ++s) {
    const Segment& segment = w.segments[s];
    if (kHasTables<kStorage> && (s == first || w.choice_by_segment)) tables.load(w, job.tables, job.choices(block, s));
    const uint8_t* p = w.codes + (size_t(block) * w.chunk_count + segment.chunk) * w.chunk_bytes;
    for (int c = 0; c < segment.chunks; ++c, p += w.chunk_bytes, panel += 256 * kParts)
      for (int h = 0; h < 2; ++h) {
        __m256i weights[4][4];  // by r
        for (int r = 0; r < 4; ++r) {
          if constexpr (kParts == 4)
            decode16<kStorage>(p, tables, h, r, weights[r]);
          else
            for (int i = 0; i < 2; ++i) weights[r][i] = decode<kStorage>(p, tables.of[h][r], bias, h, r, i);
        }
        for (int i = 0; i < kParts; ++i) {
          __m256i part[4] = {weights[0][i], weights[1][i], weights[2][i], weights[3][i]};
          transpose(part);
          for (int q = 0; q < 4; ++q) _mm256_store_si256((__m256i*)(panel + 256 * i + 64 * q + 32 * h), part[q]);
        }
      }
  }
}

// Sums of products of a segment, out[m][row], from start[m] on; kSums words of columns (4 bytes) are summed before they
// are widened. corrections (or null): of each input row, see Corrections. By itself as in avx512.cc.
template <Product kP, int kSums, int kM, bool kCorrected>
[[gnu::noinline]] void sum_words(const uint8_t* panel, const uint8_t* x, int64_t x_stride, int words,
                                 const int32_t* corrections, int64_t correction_stride, const int32_t* start,
                                 int32_t* out) {
  __m256i sum[kM][2];
  unroll<kM * 2>([&](auto i) DYBIT_INLINE { sum[i / 2][i % 2] = _mm256_set1_epi32(start[i / 2]); });
  for (int k = 0; k < words; k += kSums, panel += 64 * kSums, x += 4 * kSums) {
    unroll<kM>([&](auto m) DYBIT_INLINE {
      auto add = [](__m256i a, __m256i b) DYBIT_INLINE {
        return kP == Product::kSigned16 ? _mm256_add_epi32(a, b) : _mm256_add_epi16(a, b);
      };
      __m256i part[2];
      if constexpr (kCorrected) part[0] = part[1] = _mm256_set1_epi32(corrections[m * correction_stride]);
      unroll<kSums>([&](auto q) DYBIT_INLINE {
        int32_t word;
        std::memcpy(&word, x + m * x_stride + 4 * q, 4);
        const __m256i xs = _mm256_set1_epi32(word);
        unroll<2>([&](auto h) DYBIT_INLINE {
          const __m256i product = multiply<kP>(_mm256_load_si256((const __m256i*)(panel + 64 * q + 32 * h)), xs);
          if constexpr (q == 0 && !kCorrected)
            part[h] = product;
          else
            part[h] = add(part[h], product);
        });
      });
      unroll<2>([&](auto h) DYBIT_INLINE {
        sum[m][h] = _mm256_add_epi32(sum[m][h], kP == Product::kSigned16 ? part[h] : widen(part[h]));
      });
    });
    if constexpr (kCorrected) ++corrections;
  }
  unroll<kM * 2>([&](auto i) DYBIT_INLINE { _mm256_store_si256((__m256i*)(out + 8 * i), sum[i / 2][i % 2]); });
}

// kM input rows times a panel, kSums products summed before they are widened.
template <Product kP, int kSums, int kM, bool kCorrected>
void tile(const Job& job, const uint8_t* panel, int block, int first, int last, int m0) {
  const Weight& w = job.w;
  constexpr int kSize = kP == Product::kSigned16 ? 2 : 1;
  alignas(32) float total[kM][kBlockRows] = {};
  alignas(32) int32_t sums[kM * kBlockRows];
  const int rows = std::min(kBlockRows, w.rows - block * kBlockRows);
  if (first)
    for (int m = 0; m < kM; ++m)
      std::memcpy(total[m], job.out.data + (m0 + m) * job.out.stride + block * kBlockRows, sizeof(float) * rows);
  const uint8_t* x = job.x + m0 * job.x_stride + size_t(w.segments[first].chunk) * kChunk * kSize;
  for (int s = first; s < last; ++s) {
    int32_t start[kM] = {};
    if (kP == Product::kSigned8 && !kCorrected)
      for (int m = 0; m < kM; ++m) start[m] = -job.correction(m0 + m, s);
    const int words = w.segments[s].chunks * kChunk * kSize / 4;  // a multiple of 8
    const int64_t stride = job.x_stride / 4 / kSums;
    const int32_t* corrections =
        kCorrected ? job.corrections + m0 * stride + w.segments[s].chunk * kChunk / 4 / kSums : nullptr;
    sum_words<kP, kSums, kM, kCorrected>(panel, x, job.x_stride, words, corrections, stride, start, sums);
    panel += size_t(words) * 64;
    x += words * 4;
    const __m256 low = _mm256_loadu_ps(job.scales(block, s)), high = _mm256_loadu_ps(job.scales(block, s) + 8);
    for (int m = 0; m < kM; ++m) {
      float* t = total[m];
      auto part = [&](int h) { return _mm256_load_si256((const __m256i*)(sums + m * kBlockRows + 8 * h)); };
      _mm256_store_ps(t, add_segment(job, part(0), _mm256_load_ps(t), low, m0 + m, s));
      _mm256_store_ps(t + 8, add_segment(job, part(1), _mm256_load_ps(t + 8), high, m0 + m, s));
    }
  }
  for (int m = 0; m < kM; ++m) store_totals(job, total[m], m0 + m, block, last == w.segment_count);
}

template <Product kP, int kSums, bool kCorrected = false>
void tiles(const Job& job, const uint8_t* panel, int block, int first, int last) {
  int m = 0;
  for (; m + kTileRows <= job.in.rows; m += kTileRows)
    tile<kP, kSums, kTileRows, kCorrected>(job, panel, block, first, last, m);
  switch (job.in.rows - m) {
    case 3: tile<kP, kSums, 3, kCorrected>(job, panel, block, first, last, m); break;
    case 2: tile<kP, kSums, 2, kCorrected>(job, panel, block, first, last, m); break;
    case 1: tile<kP, kSums, 1, kCorrected>(job, panel, block, first, last, m); break;
    default: break;
  }
}

// What biased weights add to the sums of 16 bits: for every input row and kSums words of its columns, minus bias times the
// sums of the even and of the odd pairs of columns. With it in the sum, only the sum of unbiased products must fit 16
// bits, not what it passes on the way, which wraps: so twice as many fit.
template <int kSums>
const int32_t* corrections(const Job& job) {
  static thread_local std::vector<int32_t> memory;
  const int64_t groups = job.x_stride / 4 / kSums;
  memory.resize(size_t(groups) * job.in.rows);
  for (int m = 0; m < job.in.rows; ++m) {
    const int8_t* x = reinterpret_cast<const int8_t*>(job.x + m * job.x_stride);
    int32_t* out = memory.data() + m * groups;
    for (int64_t g = 0; g < groups; ++g, x += 4 * kSums) {
      int even = 0, odd = 0;
      for (int q = 0; q < kSums; ++q) even += x[4 * q] + x[4 * q + 1], odd += x[4 * q + 2] + x[4 * q + 3];
      out[g] = int32_t(uint32_t(uint16_t(-job.bias * even)) | uint32_t(uint16_t(-job.bias * odd)) << 16);
    }
  }
  return memory.data();
}

uint8_t* panel_memory() {
  static thread_local std::vector<uint8_t> memory(kPanelBytes + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

template <int kStorage, Product kP>
void run(Job job, int first_block, int last_block) {
  const int sums = safe_sums(job.w.max_weight, job.in.max_input, kP == Product::kSigned8);
  const int most = int(kPanelBytes / (size_t(kChunk) * kBlockRows * (kP == Product::kSigned16 ? 2 : 1)));
  uint8_t* panel = panel_memory();
  const bool corrected = kP == Product::kSigned8 && sums < 4 && job.in.rows > 1;
  if (corrected) job.corrections = sums >= 2 ? corrections<4>(job) : corrections<2>(job);
  for (int block = first_block; block < last_block; ++block) {
    if (job.in.rows == 1) {
      sums >= 2 ? stream_block<kStorage, kP, true>(job, block) : stream_block<kStorage, kP, false>(job, block);
      continue;
    }
    for (int first = 0, last; first < job.w.segment_count; first = last) {
      int chunks = 0;
      for (last = first; last < job.w.segment_count && chunks + job.w.segments[last].chunks <= most; ++last)
        chunks += job.w.segments[last].chunks;
      unpack_panel<kStorage, kP>(job, block, first, last, panel);
      if (corrected && sums >= 2)
        tiles<kP, 4, kP == Product::kSigned8>(job, panel, block, first, last);
      else if (corrected)
        tiles<kP, 2, kP == Product::kSigned8>(job, panel, block, first, last);
      else if (kP == Product::kSigned16 || sums >= 4)
        tiles<kP, 4>(job, panel, block, first, last);
      else if (sums >= 2)
        tiles<kP, 2>(job, panel, block, first, last);
      else
        tiles<kP, 1>(job, panel, block, first, last);
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

template <int kStorage>
void expand8(const Weight& w, int block, int s, int8_t* out) {
  const Segment& segment = w.segments[s];
  const uint8_t* choices =
      w.choices + (size_t(block) * (w.choice_by_segment ? w.segment_count : 1) + (w.choice_by_segment ? s : 0)) * 16;
  __m256i table[2][4] = {};
  if (kStorage < 8) load_tables(w.tables, choices, table);
  const int64_t stride = int64_t(segment.chunks) * kChunk;
  const uint8_t* p = w.codes + (size_t(block) * w.chunk_count + segment.chunk) * w.chunk_bytes;
  for (int c = 0; c < segment.chunks; ++c, p += w.chunk_bytes)
    for (int h = 0; h < 2; ++h)
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i) {
          const __m256i bytes = decode<kStorage>(p, table[h][r], _mm256_setzero_si256(), h, r, i);
          int8_t* to = out + (8 * h + r) * stride + c * kChunk + 16 * i;
          _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(bytes));
          _mm_storeu_si128((__m128i*)(to + 4 * stride), _mm256_extracti128_si256(bytes, 1));
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

// Eight significands as floats.
inline __m256 widen(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

inline __m256 widen(const int16_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// float_sum of four rows, which share the loads of the input.
struct {
  template <class T>
  void operator()(const float* x, const T* w, int padded, float out[4]) const {
    __m256 low[4], high[4];
    unroll<4>([&](auto n) DYBIT_INLINE { low[n] = high[n] = _mm256_setzero_ps(); });
    for (int k = 0; k < padded; k += 16) {
      const __m256 x0 = _mm256_loadu_ps(x + k), x1 = _mm256_loadu_ps(x + k + 8);
      unroll<4>([&](auto n) DYBIT_INLINE {
        low[n] = _mm256_fmadd_ps(x0, widen(w + int64_t(n) * padded + k), low[n]);
        high[n] = _mm256_fmadd_ps(x1, widen(w + int64_t(n) * padded + k + 8), high[n]);
      });
    }
    unroll<4>([&](auto n) DYBIT_INLINE {
      const __m256 eight = _mm256_add_ps(low[n], high[n]);
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      out[n] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    });
  }
} const float_sums;

void float_blocks(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  auto bytes = [&](int block, int s, int8_t* to) { expand(w, block, s, to); };
  auto words = [&](int block, int s, int16_t* to) { expand_plainly(w, block, s, to); };
  for (int block = first_block; block < last_block; ++block) {
    if (w.storage > 8)
      float_linear<int16_t>(w, in, out, block, words, float_sums);
    else
      float_linear<int8_t>(w, in, out, block, bytes, float_sums);
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
  alignas(32) int8_t tables[kMaxBooks * 16];
  const int bias = in.kind == InputKind::kSigned8 ? w.max_weight : 0;
  for (int i = 0; i < kMaxBooks * 16; ++i) tables[i] = int8_t(w.tables[i] + bias);
  const int64_t size = in.kind == InputKind::kSigned16 ? 2 : 1;
  const Job job{w, in, out, tables, static_cast<const uint8_t*>(in.data), int64_t(w.chunk_count) * kChunk * size, bias};
  switch (in.kind) {
    case InputKind::kSigned8: run_storage<Product::kSigned8>(job, first_block, last_block); break;
    case InputKind::kUnsigned8: run_storage<Product::kUnsigned8>(job, first_block, last_block); break;
    default: run_storage<Product::kSigned16>(job, first_block, last_block);
  }
}

void encode(const EncodeTask& task, int first_row, int last_row) { encode_rows(task, first_row, last_row); }

int64_t multiply(int64_t count) {
  constexpr int kChains = 12;  // enough for what an instruction takes until its result is there
  __m256i part[kChains], x = _mm256_set1_epi8(1);
  unroll<kChains>([&](auto i) DYBIT_INLINE { part[i] = _mm256_set1_epi32(i); });
  for (int64_t k = 0; k < count; ++k)
    unroll<kChains>([&](auto i) DYBIT_INLINE { part[i] = _mm256_maddubs_epi16(part[i], x); });
  unroll<kChains>([&](auto i) DYBIT_INLINE { x = _mm256_xor_si256(x, part[i]); });
  return count * kChains * 32 + (_mm256_extract_epi8(x, 0) & 1);
}

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", 1, input_kind, linear, encode, dequantize, &kAvx2Codes, multiply};

}  // namespace dybit
DYBIT_TARGET_END
#endif
