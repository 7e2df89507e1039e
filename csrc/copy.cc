#include "copy.h"

#include <cstring>
#include <type_traits>

#include "pool.h"

namespace dybit {
namespace {

constexpr int64_t kLittle = 1 << 16;  // bytes that do not pay for a second thread
constexpr int kTile = 16;

// A matrix. If one side is contiguous along rows and the other along columns, small tiles keep lines in the cache.
template <class From, class To>
void copy_matrix(int64_t rows, int64_t columns, const From* from, const int64_t* f, To* to, const int64_t* t) {
  if (std::is_same_v<From, To> && f[1] == 1 && t[1] == 1) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(to + i * t[0], from + i * f[0], sizeof(To) * columns);
    return;
  }
  for (int64_t i0 = 0; i0 < rows; i0 += kTile)
    for (int64_t j0 = 0; j0 < columns; j0 += kTile)
      for (int64_t i = i0; i < rows && i < i0 + kTile; ++i)
        for (int64_t j = j0; j < columns && j < j0 + kTile; ++j) to[i * t[0] + j * t[1]] = To(from[i * f[0] + j * f[1]]);
}

template <class From, class To>
void copy_as(const CopyTask& task, const From* from, To* to, int threads) {
  constexpr int kOuter = kCopyDimensions - 2;
  const auto& sizes = task.sizes;
  int64_t count = 1, all = sizeof(To);
  for (int d = 0; d < kOuter; ++d) count *= sizes[d];
  for (int64_t n : sizes) all *= n;
  parallel_for(int(count), all < kLittle ? 1 : threads, [&](int index) {
    const From* x = from;
    To* y = to;
    for (int64_t d = kOuter - 1, i = index; d >= 0; i /= sizes[d], --d) {
      x += i % sizes[d] * task.from_strides[d];
      y += i % sizes[d] * task.to_strides[d];
    }
    copy_matrix(sizes[kOuter], sizes[kOuter + 1], x, &task.from_strides[kOuter], y, &task.to_strides[kOuter]);
  });
}

// Calls f(address of the type).
template <class Address, class F>
void with_type(Element type, Address* address, F&& f) {
  auto as = [&](auto zero) {
    using T = std::conditional_t<std::is_const_v<Address>, const decltype(zero), decltype(zero)>;
    f(static_cast<T*>(address));
  };
  switch (type) {
    case Element::kFloat: return as(0.0f);
    case Element::kInt64: return as(int64_t(0));
    case Element::kInt32: return as(int32_t(0));
    case Element::kBool: return as(false);
  }
}

}  // namespace

void convert(const CopyTask& task, Element from_type, const void* from, Element to_type, void* to, int threads) {
  with_type(from_type, from, [&](auto* x) {
    with_type(to_type, to, [&](auto* y) { copy_as(task, x, y, threads); });
  });
}

void copy(const CopyTask& task, int element_bytes, const void* from, void* to, int threads) {
  switch (element_bytes) {
    case 1: return copy_as(task, static_cast<const uint8_t*>(from), static_cast<uint8_t*>(to), threads);
    case 2: return copy_as(task, static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), threads);
    case 4: return copy_as(task, static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), threads);
    default: copy_as(task, static_cast<const uint64_t*>(from), static_cast<uint64_t*>(to), threads);
  }
}

}  // namespace dybit
