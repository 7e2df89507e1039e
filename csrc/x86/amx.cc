// Linear layers with AMX. An instruction multiplies tiles: 16 rows of inputs by 16 rows of weights over 64 columns. A
// few rows of inputs, FP32 inputs and weights of 16 bits use AVX-512, which every processor with AMX has. Weights of 16
// bits would take four products and are no faster.
//
// A tile of weights is 16 words of 4 columns, each of 16 rows; a tile of inputs lies as it is in memory. The signs of
// both operands can be chosen, so nothing is biased. Inputs of 16 bits are two planes of bytes, the upper one signed.
// Their sums may wrap when they are joined, but are exact modulo 2^32, and the sum of a segment fits 32 bits.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "scratch.h"

#if defined(DYBIT_AMX)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "target.h"

namespace dybit {

bool amx_permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

}  // namespace dybit

DYBIT_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,amx-tile,amx-int8")
namespace dybit {
namespace {

#include "generic/unroll.inc"

#include "generic/storage.inc"

#include "generic/job.inc"

#include "avx512_decode.inc"

constexpr int kGrain = 4;    // blocks: the smallest piece of work for a thread
constexpr int kFewRows = 4;  // up to so many input rows, AVX-512 is faster
constexpr int kStep = 64;    // columns of a tile
constexpr int kTile = 1024;  // bytes: 16 rows of 64
constexpr int kPair = 2 * kBlockRows;  // input rows, and weight rows, of four tiles of sums
constexpr int kPanelSteps = 8;         // of columns, at least a segment: the weights of a pair stay in the L1 cache
constexpr int kPackedBytes = 1 << 20;  // of inputs, at least a pair: they stay in the L2 cache
constexpr int kMostTiles = 16;         // of inputs: each row of results is on another page of memory

enum class Product { kSigned8, kUnsigned8, kPlanes };

constexpr int kPlanesOf(Product p) { return p == Product::kPlanes ? 2 : 1; }

int steps_of(const Segment& segment) { return (segment.chunks + 1) / 2; }

// Packs 16 · tiles rows of inputs from m0 on, zeros beyond the last one: to[step][tile][plane], the upper plane first.
// Unpacked, the rows of a tile would often share a set of the cache.
template <Product kP>
void pack_inputs(const Job& job, int m0, int tiles, uint8_t* to) {
  const Weight& w = job.w;
  const int64_t columns = int64_t(w.chunk_count) * kChunk;
  constexpr int kPlanes = kPlanesOf(kP);
  const int64_t next = int64_t(tiles) * kPlanes * kTile;
  for (int row = 0; row < tiles * kBlockRows; ++row) {
    const bool there = m0 + row < job.in.rows;
    const uint8_t* from = static_cast<const uint8_t*>(job.in.data) + (m0 + row) * columns * kPlanes;
    uint8_t* at = to + row / kBlockRows * kPlanes * kTile + row % kBlockRows * kStep;
    for (int s = 0; s < w.segment_count; ++s) {
      const Segment& segment = w.segments[s];
      const uint8_t* x = from + int64_t(segment.chunk) * kChunk * kPlanes;
      for (int c = 0; c < segment.chunks; c += 2, at += next, x += kStep * kPlanes) {
        const bool half = c + 1 == segment.chunks;
        if constexpr (kPlanes == 2) {
          const __m512i a = there ? _mm512_loadu_si512(x) : _mm512_setzero_si512();
          const __m512i b = there && !half ? _mm512_loadu_si512(x + 64) : _mm512_setzero_si512();
          auto both = [](__m512i a, __m512i b) DYBIT_INLINE {
            return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
          };
          _mm512_store_si512(at, both(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8)));
          _mm512_store_si512(at + kTile, both(a, b));
        } else {
          const __mmask16 mask = !there ? 0 : half ? 0x00ff : 0xffff;
          _mm512_store_si512(at, _mm512_maskz_loadu_epi32(mask, x));
        }
      }
    }
  }
}

// Unpacks the segments first … last of one or two blocks: panel[step][block], a tile each.
template <Storage kStorage>
void unpack_panel(const Job& job, int block0, int blocks, int first, int last, uint8_t* panel) {
  const Weight& w = job.w;
  for (int j = 0; j < blocks; ++j) {
    Tables<kStorage> table;
    uint8_t* to = panel + j * kTile;
    for (int s = first; s < last; ++s) {
      const Segment& segment = w.segments[s];
      if (has_tables(kStorage) && job.tables_change(s, first))
        table.load(w, job.tables, job.choices(block0 + j, s));
      const uint8_t* p = job.codes(block0 + j, s);
      auto half_tile = [&](uint8_t* half) DYBIT_INLINE {
        __m512i bytes[2][4];
        decode<kStorage, 0>(p, table, bytes);
        unroll<2>([&](auto i) DYBIT_INLINE {
          transpose(bytes[i]);
          unroll<4>([&](auto q) DYBIT_INLINE { _mm512_store_si512(half + (i * 4 + q) * 64, bytes[i][q]); });
        });
        p += w.chunk_bytes;
      };
      for (int c = 0; c + 2 <= segment.chunks; c += 2, to += 2 * kTile) {
        half_tile(to);
        half_tile(to + kTile / 2);
      }
      if (segment.chunks % 2) {
        half_tile(to);
        std::memset(to + kTile / 2, 0, kTile / 2);
        to += 2 * kTile;
      }
    }
  }
}

// The sums of products of planes of inputs, of 32 rows of inputs and two blocks: sums[plane][row][block][16].
constexpr int kSums = kPair * kPair;

// The sums of a segment, for 16 · kRows rows of inputs. Instructions take the numbers of tiles as constants, so each
// shape is written out: 2 × 2 tiles of sums, or with planes two for each block.
template <Product kP, int kRows>
void multiply_tiles(const uint8_t* panel, const uint8_t* x, int steps, int32_t* sums) {
  constexpr int kNextWeights = 2 * kTile, kNextInputs = kRows * kPlanesOf(kP) * kTile;
  constexpr int kLine = kPair * 4;  // bytes between rows of sums
  auto zero = [] {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  };
  auto store = [](int32_t* a, int32_t* b, int32_t* c, int32_t* d) {
    _tile_stored(0, a, kLine);
    _tile_stored(1, b, kLine);
    _tile_stored(2, c, kLine);
    _tile_stored(3, d, kLine);
  };
  auto load = [](const uint8_t* x, const uint8_t* y, const uint8_t* p, const uint8_t* q) {
    _tile_loadd(4, x, 64);
    _tile_loadd(5, y, 64);
    _tile_loadd(6, p, 64);
    _tile_loadd(7, q, 64);
  };
  if constexpr (kPlanesOf(kP) == 1 && kRows == 2) {
    zero();
    for (int k = 0; k < steps; ++k, panel += kNextWeights, x += kNextInputs) {
      load(x, x + kTile, panel, panel + kTile);
      if constexpr (kP == Product::kSigned8) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
    }
    store(sums, sums + kBlockRows, sums + kSums / 2, sums + kSums / 2 + kBlockRows);
  } else if constexpr (kPlanesOf(kP) == 1) {
    _tile_zero(0);
    _tile_zero(1);
    for (int k = 0; k < steps; ++k, panel += kNextWeights, x += kNextInputs) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, panel, 64);
      _tile_loadd(7, panel + kTile, 64);
      if constexpr (kP == Product::kSigned8) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
      } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
      }
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kBlockRows, kLine);
  } else {
    for (int i = 0; i < kRows; ++i, x += 2 * kTile, sums += kSums / 2) {
      zero();
      for (int k = 0; k < steps; ++k) {
        const uint8_t *xs = x + k * kNextInputs, *p = panel + k * kNextWeights;
        load(xs, xs + kTile, p, p + kTile);
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
      }
      store(sums, sums + kBlockRows, sums + kSums, sums + kSums + kBlockRows);
    }
  }
}

// 16 sums from those of their planes.
template <Product kP>
DYBIT_INLINE inline __m512i joined(const int32_t* sums) {
  const __m512i upper = _mm512_load_si512(sums);
  if constexpr (kP != Product::kPlanes) return upper;
  return _mm512_add_epi32(_mm512_slli_epi32(upper, 8), _mm512_load_si512(sums + kSums));
}

// Adds kCount segments from s on to the totals of `rows` rows of inputs and one or two blocks, total[row][block][16].
template <Product kP, int kCount>
void add_segments(const Job& job, int block0, int blocks, int s, int m0, int rows, const int32_t* const* sums,
                  float* total) {
  const float* groups = job.in.group_scales ? job.in.group_scales + int64_t(m0) * job.w.segment_count + s : nullptr;
  for (int j = 0; j < blocks; ++j) {
    __m512 scale[kCount];
    for (int i = 0; i < kCount; ++i) scale[i] = _mm512_loadu_ps(job.scales(block0 + j, s + i));
    auto all = [&](auto begins, auto grouped) DYBIT_INLINE {
      for (int m = 0; m < rows; ++m) {
        const int at = m * kPair + j * kBlockRows;
        __m512 t = begins ? _mm512_setzero_ps() : _mm512_load_ps(total + at);
        unroll<kCount>([&](auto i) DYBIT_INLINE {
          __m512 factor = scale[i];
          if constexpr (grouped)
            factor = _mm512_mul_ps(factor, _mm512_set1_ps(groups[int64_t(m) * job.w.segment_count + i]));
          t = _mm512_fmadd_ps(_mm512_cvtepi32_ps(joined<kP>(sums[i] + at)), factor, t);
        });
        _mm512_store_ps(total + at, t);
      }
    };
    if (groups && s == 0)
      all(std::true_type{}, std::true_type{});
    else if (groups)
      all(std::false_type{}, std::true_type{});
    else if (s == 0)
      all(std::true_type{}, std::false_type{});
    else
      all(std::false_type{}, std::false_type{});
  }
}

// Up to 16 · kRows rows of inputs from m0 on, and one or two blocks, over the segments of a panel. If the sums of two
// segments fit the L1 cache beside the panel, they are added while the tiles of the next ones are multiplied.
template <Product kP, int kRows>
void tiles(const Job& job, const uint8_t* x, const uint8_t* panel, int block0, int blocks, int first, int last, int m0,
           float* total) {
  const Weight& w = job.w;
  constexpr int kKept = kP == Product::kPlanes ? 1 : 4;
  alignas(64) int32_t sums[kKept][kPlanesOf(kP) * kSums];
  const int rows = std::min(kRows * kBlockRows, job.in.rows - m0);
  auto multiply = [&](int s) DYBIT_INLINE {
    const int steps = steps_of(w.segments[s]);
    multiply_tiles<kP, kRows>(panel, x, steps, sums[(s - first) % kKept]);
    panel += size_t(steps) * 2 * kTile;
    x += size_t(steps) * kRows * kPlanesOf(kP) * kTile;
  };
  auto add = [&](int s, auto count) DYBIT_INLINE {
    const int32_t* some[] = {sums[(s - first) % kKept], sums[(s - first + 1) % kKept]};
    add_segments<kP, count>(job, block0, blocks, s, m0, rows, some, total);
  };
  constexpr std::integral_constant<int, 1> kOne{};
  if constexpr (kKept == 1) {
    for (int s = first; s < last; ++s) {
      multiply(s);
      add(s, kOne);
    }
    return;
  }
  constexpr std::integral_constant<int, 2> kTwo{};
  int s = first;
  for (; s + 2 <= last; s += 2) {
    multiply(s);
    multiply(s + 1);
    if (s > first) add(s - 2, kTwo);
  }
  if (s < last) multiply(s);
  if (s > first) add(s - 2, kTwo);
  if (s < last) add(s, kOne);
}

void store_results(const Job& job, int block0, int blocks, int m0, int rows, const float* total) {
  for (int j = 0; j < blocks; ++j) {
    const __mmask16 mask = __mmask16((1 << job.w.rows_of(block0 + j)) - 1);
    const __m512 bias = _mm512_loadu_ps(job.out.bias + (block0 + j) * kBlockRows);
    for (int m = 0; m < rows; ++m)
      _mm512_mask_storeu_ps(job.y(m0 + m, block0 + j), mask,
                            _mm512_fmadd_ps(_mm512_load_ps(total + m * kPair + j * kBlockRows),
                                            _mm512_set1_ps(job.in.row_scales[m0 + m]), bias));
  }
}

thread_local Scratch panel_memory, input_memory, total_memory;

template <Storage kStorage, Product kP>
void run(const Job& job, int first_block, int last_block) {
  const Weight& w = job.w;
  int most = kPanelSteps, all = 0;
  for (int s = 0; s < w.segment_count; ++s) {
    most = std::max(most, steps_of(w.segments[s]));
    all += steps_of(w.segments[s]);
  }
  const size_t tile_bytes = size_t(all) * kPlanesOf(kP) * kTile;  // of 16 rows of inputs
  const int tiles_wanted = (job.in.rows + kBlockRows - 1) / kBlockRows;
  const int tiles_once = std::min(tiles_wanted, std::clamp(int(kPackedBytes / tile_bytes) / 2 * 2, 2, kMostTiles));
  auto* panel = panel_memory.take<uint8_t>(size_t(most) * 2 * kTile);
  auto* packed = input_memory.take<uint8_t>(tiles_once * tile_bytes);
  auto* totals = total_memory.take<float>((tiles_once + 1) * kBlockRows * kPair);
  for (int start = 0; start < tiles_wanted; start += tiles_once) {
    const int end = std::min(tiles_wanted, start + tiles_once);
    for (int t = start; t < end; t += 2)
      pack_inputs<kP>(job, t * kBlockRows, std::min(2, end - t), packed + (t - start) * tile_bytes);
    for (int block = first_block; block < last_block; block += 2) {
      auto each_pair = [&](auto work) DYBIT_INLINE {  // of tiles of inputs: work(tiles, first row, inputs, totals)
        for (int t = start; t < end; t += 2)
          work(std::min(2, end - t), t * kBlockRows, packed + (t - start) * tile_bytes,
               totals + (t - start) * kBlockRows * kPair);
      };
      const int blocks = std::min(2, last_block - block);
      int done = 0;
      const size_t block_bytes = w.chunk_count * w.chunk_bytes;
      const uint8_t* codes = w.codes + block * block_bytes;
      for (int first = 0, last; first < w.segment_count; first = last) {
        int steps = 0;
        for (last = first; last < w.segment_count && steps + steps_of(w.segments[last]) <= most; ++last)
          steps += steps_of(w.segments[last]);
        unpack_panel<kStorage>(job, block, blocks, first, last, panel);
        std::atomic_signal_fence(std::memory_order_seq_cst);  // GCC does not know that tiles read memory
        // Meanwhile the codes that are unpacked next are prefetched, a share with each pair of tiles of inputs.
        const Segment& end_segment = w.segments[last - 1];
        const int next_chunk = end_segment.chunk + end_segment.chunks;
        const uint8_t* next = codes + (last < w.segment_count ? next_chunk * w.chunk_bytes : 2 * block_bytes);
        const int lines = int((next_chunk - w.segments[first].chunk) * w.chunk_bytes / 64);
        const int share = (2 * lines + end - start - 1) / (end - start);
        int fetched = 0;
        each_pair([&](int count, int m, const uint8_t* x, float* total) DYBIT_INLINE {
          for (const int to = std::min(lines, fetched + share); fetched < to; ++fetched)
            for (int j = 0; j < 2; ++j)
              _mm_prefetch((const char*)next + j * block_bytes + size_t(fetched) * 64, _MM_HINT_T1);
          x += size_t(done) * count * kPlanesOf(kP) * kTile;
          if (count == 2)
            tiles<kP, 2>(job, x, panel, block, blocks, first, last, m, total);
          else
            tiles<kP, 1>(job, x, panel, block, blocks, first, last, m, total);
        });
        done += steps;
      }
      each_pair([&](int count, int m, const uint8_t*, float* total) DYBIT_INLINE {
        store_results(job, block, blocks, m, std::min(count * kBlockRows, job.in.rows - m), total);
      });
    }
  }
}

template <Product kP>
void run_any(const Job& job, int first_block, int last_block) {
  with_narrow_storage(job.w.storage,
                      [&](auto storage) { run<decltype(storage)::value, kP>(job, first_block, last_block); });
}

// All tiles are 16 × 64 bytes.
struct alignas(64) Shapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
constexpr Shapes kShapes{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

void linear(const Weight& w, const Input& in, const Output& out, int first_block, int last_block) {
  if (in.kind == InputKind::kFloat || in.rows <= kFewRows || is_wide(w.storage))
    return kAvx512.linear(w, in, out, first_block, last_block);
  _tile_loadconfig(&kShapes);
  const Job job{w, in, out, w.tables, nullptr, 0, 0, nullptr};
  if (in.kind == InputKind::kSigned8)
    run_any<Product::kSigned8>(job, first_block, last_block);
  else if (in.kind == InputKind::kUnsigned8)
    run_any<Product::kUnsigned8>(job, first_block, last_block);
  else
    run_any<Product::kPlanes>(job, first_block, last_block);
  _tile_release();  // or each change of threads would save the tiles
}

InputKind input_kind(Storage storage, int max_weight, int max_input, bool is_signed) {
  return kAvx512.input_kind(storage, max_weight, max_input, is_signed);
}

void dequantize(const Weight& w, float* out, int first_block, int last_block) {
  kAvx512.dequantize(w, out, first_block, last_block);
}

int64_t multiply(int64_t count) {
  alignas(64) static const uint8_t ones[kTile] = {1};
  alignas(64) int32_t sums[kTile / 4];
  _tile_loadconfig(&kShapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, ones, 64);
  _tile_loadd(5, ones, 64);
  for (int64_t k = 0; k < count; ++k) {
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 5);
    _tile_dpbssd(2, 4, 5);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, sums, 64);
  _tile_release();
  return count * 4 * kBlockRows * kBlockRows * kStep + (sums[0] & 1);
}

}  // namespace

extern const Kernels kAmx;
const Kernels kAmx = {"amx", kGrain, input_kind, linear,
                      dequantize, &kAvx512Codes, &kAvx512Rows, multiply};

}  // namespace dybit
DYBIT_TARGET_END
#endif
