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

#include "codes.h"
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

// An address (0: none), whether there is a number for each row, and whether for each group.
using UnitSpread = std::tuple<uintptr_t, bool, bool>;
template <class T>
dybit::PerUnit<T> per_unit(const UnitSpread& spread) {
  return {pointer<T>(std::get<0>(spread)), std::get<1>(spread), std::get<2>(spread)};
}

void define_cache(nanobind::module_& m);
void define_decoder(nanobind::module_& m);
void define_layers(nanobind::module_& m);
void define_program(nanobind::module_& m);
void define_rows(nanobind::module_& m);
