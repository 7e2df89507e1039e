// Copies a tensor from one layout to another.
#pragma once

#include <array>
#include <cstdint>

namespace dybit {

constexpr int kCopyDimensions = 6;

struct CopyTask {
  std::array<int64_t, kCopyDimensions> sizes, from_strides, to_strides;  // strides in elements
  int element_bytes;                                                     // 1, 2, 4 or 8
};

void copy(const CopyTask& task, const void* from, void* to, int threads);

}  // namespace dybit
