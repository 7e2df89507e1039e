// The Python module. It takes addresses and sizes; dybit/kernels/ and dybit/operators/ check them.
#include "module_parts.h"

#include "codes.h"
#include "depthwise.h"
#include "dispatch.h"
#include "peak.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

dybit::PackedWeight* make(uintptr_t packed, int64_t rows, int64_t columns, int bits, int64_t group_size,
                          uintptr_t scale, bool scale_by_row, bool scale_by_group, uintptr_t choice,
                          bool choice_by_row, bool choice_by_group, uintptr_t significands, uintptr_t steps, int books,
                          int magnitude_bits, int max_run, bool is_signed, int64_t input_group_size) {
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

// Rows, columns, elements of a group.
dybit::Units units(const std::array<int64_t, 3>& shape) { return {shape[0], shape[1], shape[2]}; }

void define_codes(nb::module_& m) {
  using Shape = std::array<int64_t, 3>;
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<dybit::Codebook>(m, "Codebook")
      .def(nb::new_([](uintptr_t boundaries, uintptr_t values, uintptr_t codes, int count) {
        return new dybit::Codebook(pointer<float>(boundaries), pointer<float>(values), pointer<uint8_t>(codes), count);
      }))
      .def("round",
           [](const dybit::Codebook& self, const Shape& shape, uintptr_t x, uintptr_t out, bool half,
              const UnitSpread& scale, uintptr_t offset, float reach, int threads) {
             dybit::round_units(self, units(shape), pointer<void>(x), writable<void>(out), half, per_unit<float>(scale),
                                pointer<float>(offset), reach, threads);
           },
           released)
      .def("fit",
           [](const dybit::Codebook& self, const Shape& shape, uintptr_t x, uintptr_t weights, const UnitSpread& scale,
              uintptr_t out, int threads) {
             dybit::fit_units(self, units(shape), pointer<float>(x), pointer<float>(weights), per_unit<float>(scale),
                              writable<dybit::Fit>(out), threads);
           },
           released);
  m.def("round_chosen",
        [](const std::vector<const dybit::Codebook*>& books, const Shape& shape, uintptr_t x, const UnitSpread& scale,
           const UnitSpread& choice, uintptr_t out, int threads) {
          dybit::round_chosen(books, units(shape), pointer<float>(x), per_unit<float>(scale), per_unit<uint8_t>(choice),
                              writable<float>(out), threads);
        },
        released);
  m.def("pass_through",
        [](uintptr_t limits, const Shape& shape, uintptr_t x, uintptr_t grad, uintptr_t rounded, const UnitSpread& scale,
           const UnitSpread& choice, uintptr_t x_grad, uintptr_t slopes, int threads) {
          dybit::pass_units(pointer<float>(limits), units(shape), pointer<float>(x), pointer<float>(grad),
                            pointer<float>(rounded), per_unit<float>(scale), per_unit<uint8_t>(choice),
                            writable<float>(x_grad), writable<float>(slopes), threads);
        },
        released);
  m.def("encode",
        [](const std::vector<const dybit::Codebook*>& books, const Shape& shape, int bits, uintptr_t x,
           const UnitSpread& scale, const UnitSpread& choice, uintptr_t packed, int threads) {
          dybit::encode_units(books, units(shape), bits, pointer<float>(x), per_unit<float>(scale),
                              per_unit<uint8_t>(choice), writable<uint8_t>(packed), threads);
        },
        released);
  m.def("decode",
        [](uintptr_t tables, const Shape& shape, int bits, uintptr_t packed, const UnitSpread& scale,
           const UnitSpread& choice, uintptr_t out, int threads) {
          dybit::decode_units(pointer<float>(tables), units(shape), bits, pointer<uint8_t>(packed), per_unit<float>(scale),
                              per_unit<uint8_t>(choice), writable<float>(out), threads);
        },
        released);
  m.def("add_to_histogram",
        [](uintptr_t x, uintptr_t weights, int64_t count, int half, uintptr_t histogram) {
          dybit::add_to_histogram(pointer<float>(x), pointer<float>(weights), count, half, writable<double>(histogram));
        },
        released);
  nb::class_<dybit::CoarseTable>(m, "CoarseTable")
      .def(nb::new_([](uintptr_t table, int half, int columns, uintptr_t first, int books) {
        return new dybit::CoarseTable(pointer<float>(table), half, columns, pointer<int32_t>(first), books);
      }))
      .def("search",
           [](const dybit::CoarseTable& self, const Shape& shape, uintptr_t x, uintptr_t weights, int best,
              uintptr_t out, int threads) {
             self.search(units(shape), pointer<float>(x), pointer<float>(weights), best, writable<int32_t>(out),
                         threads);
           },
           released)
      .def("search_histogram",
           [](const dybit::CoarseTable& self, uintptr_t histogram, int best, uintptr_t out) {
             self.search_histogram(pointer<double>(histogram), best, writable<int32_t>(out));
           },
           released);
}

// `first` has one or two products.
void feed_forward(const std::vector<Passed>& first, const Passed& down, int activation, uintptr_t x, int64_t rows,
                  uintptr_t y, int threads) {
  const dybit::Product second = product(first.back());
  dybit::feed_forward(product(first[0]), first.size() > 1 ? &second : nullptr, product(down),
                      dybit::Activation(activation), pointer<float>(x), rows, writable<float>(y), threads);
}

void round_rows(const dybit::PackedWeight& self, uintptr_t x, int64_t x_stride, int64_t rows, const Scaled& scale,
                uintptr_t memory, int threads) {
  self.round(pointer<float>(x), x_stride, input_scale(scale), self.rounded(rows, writable<void>(memory)), threads);
}

void multiply_rows(const dybit::PackedWeight& self, uintptr_t memory, int64_t rows, uintptr_t offset, uintptr_t bias,
                   int activation, const Strided& factor, const Strided& addend, const Strided& y, int threads) {
  const dybit::LinearFinish finish{
      pointer<float>(bias), dybit::Activation(activation),       pointer<float>(std::get<0>(factor)),
      std::get<1>(factor),  pointer<float>(std::get<0>(addend)), std::get<1>(addend)};
  self.multiply(self.rounded(rows, writable<void>(memory)), pointer<float>(offset), finish,
                writable<float>(std::get<0>(y)), std::get<1>(y), threads);
}

using Extents = std::array<dybit::Extent, 5>;  // kernel, stride, dilation, zeros before and after

dybit::ConvGeometry geometry(const Extents& e, int channels, int groups, bool channel_major) {
  return {e[0], e[1], e[2], e[3], e[4], channels, groups, channel_major};
}

template <class T>
bool convolve(const T& self, uintptr_t x, int batch, const dybit::Extent& size, uintptr_t y, uintptr_t bias,
              uintptr_t scale, uintptr_t offset, float reach, bool planar, int threads) {
  const dybit::ConvInput input{pointer<float>(x),      batch, size,  pointer<float>(scale),
                               pointer<float>(offset), reach, planar};
  return self.run(input, writable<float>(y), pointer<float>(bias), threads);
}

// Address, kind, zeros before and after in three dimensions, channels, elements of a place.
using Picture = std::tuple<uintptr_t, int, dybit::Extent, dybit::Extent, int, int>;

dybit::Image image(const Picture& p) {
  return {writable<uint8_t>(std::get<0>(p)), dybit::InputKind(std::get<1>(p)), std::get<2>(p), std::get<3>(p),
          std::get<4>(p),                    std::get<5>(p)};
}

template <class T>
bool convolve_image(const T& self, const Picture& x, int batch, const dybit::Extent& size, float scale,
                    uintptr_t offset, uintptr_t bias, uintptr_t y, uintptr_t addend, float low, float high,
                    const Picture& out, const Rounded& format, int threads) {
  const dybit::Image result = image(out);
  const dybit::Finish finish{writable<float>(y), pointer<float>(addend),          low,
                             high,               result.data ? &result : nullptr, rounding(format)};
  return self.run(image(x), batch, size, scale, pointer<float>(offset), pointer<float>(bias), finish, threads);
}

void define_convolutions(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("round_to_image",
        [](uintptr_t x, int batch, const dybit::Extent& size, const Rounded& format, const Picture& out, int threads) {
          const dybit::Rounding r = rounding(format);
          return dybit::round_to_image(pointer<float>(x), batch, size, &r, false, image(out), threads);
        },
        released);
  nb::class_<dybit::Conv>(m, "Conv")
      .def(nb::new_([](std::vector<const dybit::PackedWeight*> weights, const Extents& extents, int channels,
                       int groups, bool channel_major) {
        return new dybit::Conv(std::move(weights), geometry(extents, channels, groups, channel_major));
      }))
      .def("run", &convolve<dybit::Conv>, released)
      .def("run_image", &convolve_image<dybit::Conv>, released);
  nb::class_<dybit::Depthwise>(m, "Depthwise")
      .def(nb::new_([](uintptr_t significands, uintptr_t scales, const Extents& extents, int channels,
                       int magnitude_bits, int max_run, bool is_signed) {
        return new dybit::Depthwise(pointer<float>(significands), pointer<float>(scales),
                                    geometry(extents, channels, channels, false),
                                    {true, magnitude_bits, max_run, is_signed, 0});
      }))
      .def("run", &convolve<dybit::Depthwise>, released)
      .def("run_image", &convolve_image<dybit::Depthwise>, released);
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
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("read_all",
        [](uintptr_t memory, size_t bytes, int threads) {
          return dybit::read_all(pointer<uint8_t>(memory), bytes, threads);
        },
        released);
  m.def("multiply_bytes", &dybit::multiply_bytes, released);
  define_codes(m);
  nb::class_<dybit::PackedWeight>(m, "PackedWeight")
      .def(nb::new_(&make), nb::call_guard<nb::gil_scoped_release>(), "packed"_a, "rows"_a, "columns"_a, "bits"_a,
           "group_size"_a, "scale"_a, "scale_by_row"_a, "scale_by_group"_a, "choice"_a, "choice_by_row"_a,
           "choice_by_group"_a, "significands"_a, "steps"_a, "books"_a, "magnitude_bits"_a, "max_run"_a, "is_signed"_a,
           "input_group_size"_a)
      .def(
          "linear",
          [](const dybit::PackedWeight& self, uintptr_t x, int64_t rows, uintptr_t y, uintptr_t bias, uintptr_t scale,
             uintptr_t offset, float reach, int threads, int activation) {
            self.linear(pointer<float>(x), rows, reinterpret_cast<float*>(y), pointer<float>(bias),
                        pointer<float>(scale), pointer<float>(offset), reach, threads, dybit::Activation(activation));
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("rounded_bytes", &dybit::PackedWeight::rounded_bytes)
      .def("shares_rows_with", &dybit::PackedWeight::shares_rows_with)
      .def("round", &round_rows, released)
      .def("multiply", &multiply_rows, released)
      .def(
          "dequantize",
          [](const dybit::PackedWeight& self, uintptr_t out, int threads) {
            self.dequantize(reinterpret_cast<float*>(out), threads);
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def_prop_ro("isa", [](const dybit::PackedWeight& self) { return std::string(self.kernels().name); })
      .def_prop_ro("storage", [](const dybit::PackedWeight& self) { return int(self.weight().storage); })
      .def_prop_ro("kind", [](const dybit::PackedWeight& self) { return int(self.kind()); })
      .def_prop_ro("nbytes", &dybit::PackedWeight::bytes);
  m.def("feed_forward", &feed_forward, released);
  define_rows(m);
  define_convolutions(m);  // after the weights that they take
  define_program(m);
  define_cache(m);
  define_decoder(m);
  define_layers(m);
}
