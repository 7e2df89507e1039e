#include "copy.h"

#include <cstring>

#include "pool.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 1 << 16;  // bytes that do not pay for a second thread
constexpr int kTile = 16;

// A matrix. If one side is contiguous along rows and the other along columns, small tiles keep lines in the cache.
template <class T>
void copy_matrix(int64_t rows, int64_t columns, const T* from, const int64_t* f, T* to, const int64_t* t) {
  if (f[1] == 1 && t[1] == 1) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * t[0], from + i * f[0], sizeof(T) * columns);
    return;
  }
  for (int64_t i0 = 0; i0 < rows; i0 += kTile)
    for (int64_t j0 = 0; j0 < columns; j0 += kTile)
      for (int64_t i = i0; i < rows && i < i0 + kTile; ++i)
        for (int64_t j = j0; j < columns && j < j0 + kTile; ++j) to[i * t[0] + j * t[1]] = from[i * f[0] + j * f[1]];
}

template <class T>
void copy_as(const CopyTask& task, const T* from, T* to, int threads) {
  constexpr int kOuter = kCopyDimensions - 2;
  const auto& sizes = task.sizes;
  int64_t count = 1, all = sizeof(T);
  for (int d = 0; d < kOuter; ++d) count *= sizes[d];
  for (int64_t n : sizes) all *= n;
  parallel_for(int(count), all < kLittle ? 1 : threads, [&](int index) {
    const T* x = from;
    T* y = to;
    for (int64_t d = kOuter - 1, i = index; d >= 0; i /= sizes[d], --d) {
      x += i % sizes[d] * task.from_strides[d];
      y += i % sizes[d] * task.to_strides[d];
    }
    copy_matrix(sizes[kOuter], sizes[kOuter + 1], x, &task.from_strides[kOuter], y, &task.to_strides[kOuter]);
  });
}

}  // namespace

void copy(const CopyTask& task, const void* from, void* to, int threads) {
  switch (task.element_bytes) {
    case 1: return copy_as(task, static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), threads);
    case 2: return copy_as(task, static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), threads);
    case 4: return copy_as(task, static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), threads);
    default: copy_as(task, static_cast<const uint64_t*>(from), static_cast<uint64_t*>(to), threads);
  }
}

}  // namespace dybit
