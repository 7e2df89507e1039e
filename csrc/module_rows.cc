// The part of the Python module with functions of FP32 rows. It takes addresses, strides and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "module_parts.h"
#include "norm.h"

namespace nb = nanobind;

namespace {

// Address (0: none) and stride.
using Strided = std::tuple<uintptr_t, int64_t>;

template <class T>
T* place(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// consumer: null, or the layer that rounds y into memory of its rounded_bytes, at a scale and offset with a reach.
void norm(int rows, int columns, const Strided& x, const Strided& addend, const Strided& sum, uintptr_t weight,
          uintptr_t bias, float eps, bool root_mean_square, float weight_shift, const Strided& y,
          const dybit::PackedWeight* consumer, const std::tuple<uintptr_t, uintptr_t, float>& scale, uintptr_t rounded,
          int threads) {
  const auto [x_at, x_stride] = x;
  const auto [addend_at, addend_stride] = addend;
  const auto [sum_at, sum_stride] = sum;
  const auto [y_at, y_stride] = y;
  const dybit::NormTask task{place<const float>(x_at), x_stride,   place<const float>(addend_at),
                             addend_stride,            place<float>(sum_at), sum_stride,
                             place<const float>(weight), place<const float>(bias), eps, root_mean_square,
                             weight_shift, columns, place<float>(y_at), y_stride};
  const dybit::InputScale input{place<const float>(std::get<0>(scale)), place<const float>(std::get<1>(scale)),
                                std::get<2>(scale)};
  dybit::RoundedRows view{};
  if (consumer) view = consumer->rounded(rows, place<void>(rounded));
  dybit::norm(task, consumer, input, consumer ? &view : nullptr, rows, threads);
}

}  // namespace

void define_rows(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("norm", &norm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), released);
}
