#include "kv_cache.h"

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "cached_attention.h"
#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"

namespace dybit {
namespace {

constexpr int kGrain = 48;  // rows of a piece of work

int padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

}  // namespace

CachePage::CachePage(size_t bytes) : bytes(bytes), memory_(new uint8_t[bytes + 64]()) {
  data = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
}

KVCache::KVCache(const CacheShape& shape)
    : shape_(shape),
      value_pitch_(padded(shape.value_size)),
      key_head_(size_t(shape.key_size) * kPageTokens),
      value_head_(size_t(value_pitch_) * kPageTokens) {}

size_t KVCache::bytes() const {
  std::unordered_set<const CachePage*> seen;
  size_t sum = 0;
  for (const Sequence& sequence : sequences_)
    for (const Part& part : sequence.parts)
      if (seen.insert(part.page.get()).second) sum += part.page->bytes;
  return sum;
}

void KVCache::reset(int sequences) { sequences_.assign(size_t(sequences), {}); }

CachePage& KVCache::open_page(Sequence& sequence) {
  std::vector<Part>& parts = sequence.parts;
  const size_t bytes = sizeof(float) * shape_.kv_heads * (key_head_ + value_head_);
  if (parts.empty() || parts.back().count == kPageTokens) {
    parts.push_back({std::make_shared<CachePage>(bytes), 0});
  } else if (parts.back().page.use_count() > 1) {
    auto copy = std::make_shared<CachePage>(bytes);
    std::memcpy(copy->data, parts.back().page->data, bytes);
    parts.back().page = std::move(copy);
  }
  return *parts.back().page;
}

void KVCache::append_floats(CachePage& page, int token, int count, const CacheRows& rows, int first) const {
  float* keys = reinterpret_cast<float*>(page.data) + token;
  float* values = reinterpret_cast<float*>(page.data) + shape_.kv_heads * key_head_ + int64_t(token) * value_pitch_;
  for (int head = 0; head < shape_.kv_heads; ++head, keys += key_head_, values += value_head_) {
    const float* from = rows.keys + head * rows.key_strides[0] + first * rows.key_strides[1];
    for (int column = 0; column < shape_.key_size; ++column)
      for (int i = 0; i < count; ++i) keys[column * kPageTokens + i] = from[i * rows.key_strides[1] + column];
    from = rows.values + head * rows.value_strides[0] + first * rows.value_strides[1];
    for (int i = 0; i < count; ++i)
      std::memcpy(values + i * value_pitch_, from + i * rows.value_strides[1], sizeof(float) * shape_.value_size);
  }
}

void KVCache::append(const CacheRows* rows, int count, int threads) {
  int64_t numbers = 0;
  for (int i = 0; i < count; ++i) numbers += int64_t(rows[i].count) * shape_.kv_heads * shape_.key_size;
  parallel_for(count, numbers < 50000 ? 1 : threads, [&](int i) {
    Sequence& sequence = sequences_[rows[i].sequence];
    for (int first = 0; first < rows[i].count;) {
      CachePage& page = open_page(sequence);
      int& used = sequence.parts.back().count;
      const int some = std::min(kPageTokens - used, rows[i].count - first);
      append_floats(page, used, some, rows[i], first);
      used += some, first += some, sequence.length += some;
    }
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
    tasks.push_back({&queries[i], &attention, &shape_, sequence.length, nullptr, int(sequence.parts.size()), key_head_,
                     value_head_});
    for (const Part& part : sequence.parts) {
      const float* data = reinterpret_cast<const float*>(part.page->data);
      parts.push_back({data, data + shape_.kv_heads * key_head_, part.count});
    }
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
  const Sequence& s = sequences_[sequence];
  int first = 0;
  for (const Part& part : s.parts) {
    const float* k = reinterpret_cast<const float*>(part.page->data);
    const float* v = k + shape_.kv_heads * key_head_;
    for (int head = 0; head < shape_.kv_heads; ++head, k += key_head_, v += value_head_)
      for (int i = 0; i < part.count; ++i) {
        const int64_t row = int64_t(head) * s.length + first + i;
        for (int column = 0; column < shape_.key_size; ++column)
          keys[row * shape_.key_size + column] = k[column * kPageTokens + i];
        std::memcpy(values + row * shape_.value_size, v + i * value_pitch_, sizeof(float) * shape_.value_size);
      }
    first += part.count;
  }
}

}  // namespace dybit
