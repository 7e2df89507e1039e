#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <unordered_map>
#include <unordered_set>

#include "cached_attention.h"
#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int kGrain = 48;        // rows of a piece of work
constexpr int kFloatTokens = 64;  // of a page without codes

int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

// Vectors that share a scale: the largest power of two that divides `vectors` and is within `most` numbers.
int group_vectors(int vectors, int most) {
  int group = 8;
  while (group > 1 && (group * kLanes > most || vectors % group)) group /= 2;
  return group;
}

int checked_group(int group) {
  if (group != 16 && group != 32 && group != 64 && group != 128)
    throw std::invalid_argument("a group has 16, 32, 64 or 128 members");
  return group;
}

}  // namespace

CachePage::CachePage(size_t bytes) : bytes(bytes), memory_(new uint8_t[bytes + 128]()) {
  data = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
}

KVCache::KVCache(const CacheShape& shape, const CacheOptions& options)
    : shape_(shape), residual_(std::max(options.residual, 0)), value_pitch_(padded(shape.value_size)) {
  page_tokens_ = options.keys.coded() || options.values.coded() ? checked_group(options.key_group) : kFloatTokens;
  const int page_vectors = page_tokens_ / kLanes, value_vectors = value_pitch_ / kLanes;
  keys_ = {options.keys, {shape.key_size * page_vectors, page_vectors}, options.rotate_keys};
  values_ = {options.values,
             {page_tokens_ * value_vectors, group_vectors(value_vectors, checked_group(options.value_group))},
             options.rotate_values};
}

size_t KVCache::bytes() const {
  std::unordered_set<const CachePage*> seen;
  size_t sum = 0;
  for (const Sequence& sequence : sequences_)
    for (const Part& part : sequence.parts)
      if (seen.insert(part.page.get()).second) sum += part.page->bytes;
  return sum;
}

void KVCache::reset(int sequences) { sequences_.assign(size_t(sequences), {}); }

CachePage* KVCache::open_page(Sequence& sequence) const {
  std::vector<Part>& parts = sequence.parts;
  if (parts.empty() || parts.back().sealed || parts.back().count == page_tokens_) {
    parts.push_back({std::make_shared<CachePage>(page_bytes(false)), 0, false});
  } else if (parts.back().page.use_count() > 1) {
    auto copy = std::make_shared<CachePage>(page_bytes(false));
    std::memcpy(copy->data, parts.back().page->data, copy->bytes);
    parts.back().page = std::move(copy);
  }
  return parts.back().page.get();
}

void KVCache::store(const Arrival& arrival, int head) const {
  const RowKernels& kernels = *dybit::kernels().rows;
  static thread_local Scratch rotated_memory;
  const CacheRows& rows = *arrival.rows;
  auto side = [&](const CacheSide& side, uint8_t* to, const float* from, const int64_t* strides, int size,
                  int64_t row_pitch, int64_t column_pitch) {
    from += head * strides[0] + arrival.first * strides[1];
    int64_t stride = strides[1];
    if (side.rotated) {
      float* memory = rotated_memory.take<float>(size_t(arrival.count) * size);
      for (int i = 0; i < arrival.count; ++i) std::memcpy(memory + i * size, from + i * stride, sizeof(float) * size);
      kernels.hadamard(memory, arrival.count, size, size);
      from = memory, stride = size;
    }
    const StoredRows stored{from, stride, arrival.count, size, row_pitch, column_pitch};
    const int bits = side.open_bits();
    to += head * side.bytes(bits) + arrival.token * row_pitch * (bits / 8);
    kernels.store_cache(stored, bits, to);
  };
  side(keys_, arrival.page->data, rows.keys, rows.key_strides, shape_.key_size, 1, page_tokens_);
  side(values_, arrival.page->data + values_at(false), rows.values, rows.value_strides, shape_.value_size,
       value_pitch_, 1);
}

void KVCache::append(const CacheRows* rows, int count, int threads) {
  static thread_local std::vector<Arrival> arrivals;
  arrivals.clear();
  int64_t numbers = 0;
  for (int i = 0; i < count; ++i) {
    Sequence& sequence = sequences_[rows[i].sequence];
    numbers += int64_t(rows[i].count) * shape_.kv_heads * (shape_.key_size + shape_.value_size);
    for (int first = 0; first < rows[i].count;) {
      CachePage* page = open_page(sequence);
      int& used = sequence.parts.back().count;
      const int some = std::min(page_tokens_ - used, rows[i].count - first);
      arrivals.push_back({page, used, some, first, &rows[i]});
      used += some, first += some, sequence.length += some;
    }
  }
  const Arrival* all = arrivals.data();  // other threads have vectors of their own
  parallel_for(int(arrivals.size()) * shape_.kv_heads, numbers < 50000 ? 1 : threads,
               [&](int i) { store(all[i / shape_.kv_heads], i % shape_.kv_heads); });
  if (keys_.format.coded() || values_.format.coded()) seal(rows, count, threads);
}

void KVCache::seal(const CacheRows* rows, int count, int threads) {
  std::unordered_map<CachePage*, std::shared_ptr<CachePage>> sealed;  // sequences may share a page
  std::vector<std::pair<std::shared_ptr<CachePage>, CachePage*>> work;
  for (int i = 0; i < count; ++i) {
    Sequence& sequence = sequences_[rows[i].sequence];
    int newer = 0;
    for (size_t p = sequence.parts.size(); p-- > 0;) {
      Part& part = sequence.parts[p];
      if (part.sealed) break;
      const int after = newer;
      newer += part.count;
      if (after < residual_ || part.count < page_tokens_) continue;
      std::shared_ptr<CachePage>& page = sealed[part.page.get()];
      if (!page) {
        page = std::make_shared<CachePage>(page_bytes(true));
        work.emplace_back(part.page, page.get());
      }
      part.page = page, part.sealed = true;
    }
  }
  const RowKernels& kernels = *dybit::kernels().rows;
  parallel_for(int(work.size()) * shape_.kv_heads, threads, [&](int i) {
    static thread_local Scratch number_memory;
    const int head = i % shape_.kv_heads;
    const auto& [from, to] = work[i / shape_.kv_heads];
    auto side = [&](const CacheSide& side, size_t open_at, size_t sealed_at) {
      const uint8_t* open = from->data + open_at + head * side.bytes(side.open_bits());
      uint8_t* coded = to->data + sealed_at + head * side.bytes(side.format.bits);
      if (!side.format.coded()) {
        std::memcpy(coded, open, side.bytes(side.format.bits));
        return;
      }
      float* numbers = number_memory.take<float>(size_t(side.block.padded()) * kLanes);
      kernels.decode_cache(side.format, side.block, CacheFormat::kHalf, open, numbers);
      kernels.encode_cache(side.format, side.block, numbers, coded);
    };
    side(keys_, 0, 0);
    side(values_, values_at(false), values_at(true));
  });
}

void KVCache::attend(const CacheQueries* queries, int count, const CacheAttention& attention, int threads) const {
  struct Piece {
    int task, kv_head, first_row, last_row;
  };
  static thread_local std::vector<CachedPart> parts;
  static thread_local std::vector<CachedTask> tasks;
  static thread_local std::vector<Piece> pieces;
  parts.clear(), tasks.clear(), pieces.clear();
  const int group = attention.heads / shape_.kv_heads;
  int64_t products = 0;
  for (int i = 0; i < count; ++i) {
    const Sequence& sequence = sequences_[queries[i].sequence];
    tasks.push_back({&queries[i], &attention, &shape_, &keys_, &values_, page_tokens_, sequence.length, nullptr,
                     int(sequence.parts.size())});
    for (const Part& part : sequence.parts)
      parts.push_back({part.page->data, part.page->data + values_at(part.sealed), keys_.bits(part.sealed),
                       values_.bits(part.sealed), part.count});
    const int rows = queries[i].count * group;
    products += int64_t(rows) * shape_.kv_heads * sequence.length * (shape_.key_size + shape_.value_size);
    for (int head = 0; head < shape_.kv_heads; ++head)
      for (int first = 0; first < rows; first += kGrain)
        pieces.push_back({i, head, first, std::min(rows, first + kGrain)});
  }
  const CachedPart* next = parts.data();
  for (CachedTask& task : tasks) task.parts = next, next += task.part_count;
  const RowKernels& kernels = *dybit::kernels().rows;
  const Piece* all = pieces.data();  // other threads have vectors of their own
  const CachedTask* of = tasks.data();
  parallel_for(int(pieces.size()), products < 200000 ? 1 : threads, [&](int i) {
    kernels.attend_cached(of[all[i].task], all[i].kv_head, all[i].first_row, all[i].last_row);
  });
}

void KVCache::crop(int sequence, int length) {
  Sequence& s = sequences_[sequence];
  s.length = std::min(s.length, std::max(length, 0));
  int left = s.length;
  size_t kept = 0;
  for (; left > 0; ++kept) {
    s.parts[kept].count = std::min(s.parts[kept].count, left);
    left -= s.parts[kept].count;
  }
  s.parts.resize(kept);
}

void KVCache::reorder(const std::vector<int>& from) {
  std::vector<Sequence> moved;
  moved.reserve(from.size());
  for (int i : from) moved.push_back(sequences_[i]);
  sequences_ = std::move(moved);
}

void KVCache::read(int sequence, float* keys, float* values) const {
  const RowKernels& kernels = *dybit::kernels().rows;
  const Sequence& s = sequences_[sequence];
  static thread_local Scratch number_memory;
  auto side = [&](const CacheSide& side, const uint8_t* data, int bits, int count, float* to, int size,
                  int64_t row_pitch, int64_t column_pitch) {
    for (int head = 0; head < shape_.kv_heads; ++head, to += int64_t(s.length) * size) {
      const uint8_t* from = data + head * side.bytes(bits);
      const float* numbers = reinterpret_cast<const float*>(from);
      if (bits != CacheFormat::kFloat) {
        float* memory = number_memory.take<float>(size_t(side.block.padded()) * kLanes);
        kernels.decode_cache(side.format, side.block, bits, from, memory);
        numbers = memory;
      }
      for (int i = 0; i < count; ++i)
        for (int column = 0; column < size; ++column)
          to[int64_t(i) * size + column] = numbers[i * row_pitch + column * column_pitch];
      if (side.rotated) kernels.hadamard(to, count, size, size);
    }
  };
  for (const Part& part : s.parts) {
    side(keys_, part.page->data, keys_.bits(part.sealed), part.count, keys, shape_.key_size, 1, page_tokens_);
    side(values_, part.page->data + values_at(part.sealed), values_.bits(part.sealed), part.count, values,
         shape_.value_size, value_pitch_, 1);
    keys += int64_t(part.count) * shape_.key_size;
    values += int64_t(part.count) * shape_.value_size;
  }
}

}  // namespace dybit
