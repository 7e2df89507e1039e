// The parts of the Python module that lie in files of their own, and what they share: Python passes addresses, sizes and
// tuples.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdint>
#include <tuple>

#include "conv.h"
#include "feed_forward.h"
#include "image.h"
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

// The weight, the addresses of bias, scale and offset (0: none), and the reach.
using Passed = std::tuple<const dybit::PackedWeight*, uintptr_t, uintptr_t, uintptr_t, float>;

inline dybit::Product product(const Passed& p) {
  return {std::get<0>(p), pointer<float>(std::get<1>(p)), pointer<float>(std::get<2>(p)),
          pointer<float>(std::get<3>(p)), std::get<4>(p)};
}

// Magnitude bits, longest run, signed, scale, offset.
using Rounded = std::tuple<int, int, bool, float, float>;

inline dybit::Rounding rounding(const Rounded& r) {
  const float offset = std::get<4>(r);
  return dybit::InputFormat{true, std::get<0>(r), std::get<1>(r), std::get<2>(r), 0}.rounding(std::get<3>(r), &offset);
}

void define_cache(nanobind::module_& m);
void define_decoder(nanobind::module_& m);
void define_program(nanobind::module_& m);
void define_rows(nanobind::module_& m);
