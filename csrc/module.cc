// The Python module: pointers and sizes in, nothing of torch. Arguments are checked in dybit/kernels.py.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "packed.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <class T>
const T* pointer(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

dybit::PackedWeight* make(uintptr_t packed, int64_t rows, int64_t columns, int bits, int64_t group_size, uintptr_t scale,
                          bool scale_by_row, bool scale_by_group, uintptr_t choice, bool choice_by_row,
                          bool choice_by_group, uintptr_t significands, uintptr_t steps, int books, int magnitude_bits,
                          int max_run, bool is_signed, int64_t input_group_size) {
  const dybit::Portable portable{pointer<uint8_t>(packed),       rows,
                                 columns,                        bits,
                                 group_size,                     pointer<float>(scale),
                                 scale_by_row,                   scale_by_group,
                                 pointer<uint8_t>(choice),       choice_by_row,
                                 choice_by_group,                pointer<int32_t>(significands),
                                 pointer<float>(steps),          books};
  const dybit::InputFormat input{magnitude_bits > 0, magnitude_bits, max_run, is_signed, input_group_size};
  return new dybit::PackedWeight(portable, input, dybit::kernels());
}

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // packed weights may live until the process ends
  m.def("isa", [] { return std::string(dybit::kernels().name); });
  m.def("available", [] {
    std::vector<std::string> names;
    for (const dybit::Kernels* set : dybit::available()) names.emplace_back(set->name);
    return names;
  });
  m.def("use", &dybit::use, "name"_a);
  nb::class_<dybit::PackedWeight>(m, "PackedWeight")
      .def(nb::new_(&make), nb::call_guard<nb::gil_scoped_release>(), "packed"_a, "rows"_a, "columns"_a, "bits"_a,
           "group_size"_a, "scale"_a, "scale_by_row"_a, "scale_by_group"_a, "choice"_a, "choice_by_row"_a,
           "choice_by_group"_a, "significands"_a, "steps"_a, "books"_a, "magnitude_bits"_a, "max_run"_a, "is_signed"_a,
           "input_group_size"_a)
      .def(
          "linear",
          [](const dybit::PackedWeight& self, uintptr_t x, int64_t rows, uintptr_t y, uintptr_t bias, uintptr_t scale,
             uintptr_t offset, float reach, int threads) {
            self.linear(pointer<float>(x), rows, reinterpret_cast<float*>(y), pointer<float>(bias), pointer<float>(scale),
                        pointer<float>(offset), reach, threads);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def(
          "dequantize",
          [](const dybit::PackedWeight& self, uintptr_t out, int threads) {
            self.dequantize(reinterpret_cast<float*>(out), threads);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("isa", [](const dybit::PackedWeight& self) { return std::string(self.kernels().name); })
      .def_prop_ro("storage", [](const dybit::PackedWeight& self) { return self.weight().storage; })
      .def_prop_ro("kind", [](const dybit::PackedWeight& self) { return int(self.kind()); })
      .def_prop_ro("nbytes", &dybit::PackedWeight::bytes);
}
