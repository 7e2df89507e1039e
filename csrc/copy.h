// Copies a tensor from one layout to another.
#pragma once

#include <array>
#include <cstdint>

namespace dybit {

constexpr int kCopyDimensions = 6;

struct CopyTask {
  std::array<int64_t, kCopyDimensions> sizes, from_strides, to_strides;  // strides in elements
};

// element_bytes: 1, 2, 4 or 8.
void copy(const CopyTask& task, int element_bytes, const void* from, void* to, int threads);

enum class Element : int { kFloat = 0, kInt64, kInt32, kBool };

// Converts the elements. A number is true if it is not 0; numbers with a fraction lose it as integers.
void convert(const CopyTask& task, Element from_type, const void* from, Element to_type, void* to, int threads);

}  // namespace dybit
