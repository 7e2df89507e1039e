// The parts of the Python module that lie in files of their own, and what they share.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <tuple>

#include "packed_weight.h"

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

template <class T>
T* writable(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Address (0: none) and stride.
using Strided = std::tuple<uintptr_t, int64_t>;

// Scale, offset (addresses, 0: none) and reach.
using Scaled = std::tuple<uintptr_t, uintptr_t, float>;

inline dybit::InputScale input_scale(const Scaled& s) {
  return {pointer<float>(std::get<0>(s)), pointer<float>(std::get<1>(s)), std::get<2>(s)};
}

void define_rows(nanobind::module_& m);
