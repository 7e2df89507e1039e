// The part of the Python module with functions of FP32 rows. It takes addresses, strides and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>

#include "module_parts.h"
#include "norm.h"

namespace nb = nanobind;

namespace {

// consumer: null, or the layer that rounds y into memory of its rounded_bytes, at a scale and offset with a reach.
void norm(int rows, int columns, const Strided& x, const Strided& addend, const Strided& sum, uintptr_t weight,
          uintptr_t bias, float eps, bool root_mean_square, float weight_shift, const Strided& y,
          const dybit::PackedWeight* consumer, const Scaled& scale, uintptr_t rounded,
          int threads) {
  const auto [x_at, x_stride] = x;
  const auto [addend_at, addend_stride] = addend;
  const auto [sum_at, sum_stride] = sum;
  const auto [y_at, y_stride] = y;
  const dybit::NormTask task{pointer<float>(x_at),
                             x_stride,
                             pointer<float>(addend_at),
                             addend_stride,
                             writable<float>(sum_at),
                             sum_stride,
                             pointer<float>(weight),
                             pointer<float>(bias),
                             eps,
                             root_mean_square,
                             weight_shift,
                             columns,
                             writable<float>(y_at),
                             y_stride};
  dybit::RoundedRows view{};
  if (consumer) view = consumer->rounded(rows, writable<void>(rounded));
  dybit::norm(task, consumer, input_scale(scale), consumer ? &view : nullptr, rows, threads);
}

}  // namespace

void define_rows(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("norm", &norm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), released);
}
