// The part of the Python module with layers that are neither products nor convolutions of images.
#include "conv_transposed.h"
#include "embedding.h"
#include "module_parts.h"
#include "recurrent.h"

namespace nb = nanobind;

namespace {

// The address of indices, int64, and their number.
using Indices = std::tuple<uintptr_t, int64_t>;

// starts: the address of the first index of each bag, or 0 for bags of `length`.
bool look_up_bags(const dybit::CodedTable& self, const Indices& index, uintptr_t starts, int64_t length, int64_t bags,
                  int kind, uintptr_t out, int threads) {
  return dybit::look_up_bags(self, pointer<int64_t>(std::get<0>(index)), std::get<1>(index), pointer<int64_t>(starts),
                             length, bags, dybit::Bag(kind), writable<float>(out), threads);
}

void recur(int cell, const dybit::PackedWeight& weight, uintptr_t bias, const Scaled& scale,
           const std::vector<int64_t>& counts, bool reverse, uintptr_t x, uintptr_t h, uintptr_t c, uintptr_t y,
           int threads) {
  dybit::recur({dybit::Cell(cell), &weight, pointer<float>(bias), input_scale(scale), int64_t(counts.size()),
                counts.data(), reverse, pointer<float>(x), writable<float>(h), writable<float>(c), writable<float>(y)},
               threads);
}

bool convolve_transposed(const dybit::ConvTransposed& self, uintptr_t x, int batch, const dybit::Extent& size,
                         uintptr_t y, const dybit::Extent& places, uintptr_t bias, const Scaled& scale, bool planar,
                         int threads) {
  const auto [at, offset, reach] = scale;
  return self.run({pointer<float>(x), batch, size, pointer<float>(at), pointer<float>(offset), reach, planar}, places,
                  writable<float>(y), pointer<float>(bias), threads);
}

}  // namespace

void define_layers(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<dybit::CodedTable>(m, "CodedTable")
      .def(nb::new_([](uintptr_t values, const std::array<int64_t, 3>& shape, int bits, uintptr_t packed,
                       const UnitSpread& scale, const UnitSpread& choice, int books) {
        std::vector<dybit::ValueRuns> runs(bits == 8 ? books : 0);
        bool known = true;
        for (size_t i = 0; i < runs.size(); ++i) known &= runs[i].take(pointer<float>(values) + 256 * i);
        if (!known) runs.clear();
        return new dybit::CodedTable{pointer<float>(values),
                                     {shape[0], shape[1], shape[2]},
                                     bits,
                                     pointer<uint8_t>(packed),
                                     per_unit<float>(scale),
                                     per_unit<uint8_t>(choice),
                                     std::move(runs)};
      }))
      .def("look_up",
           [](const dybit::CodedTable& self, const Indices& index, uintptr_t out, int threads) {
             return dybit::look_up(self, pointer<int64_t>(std::get<0>(index)), std::get<1>(index), writable<float>(out),
                                   threads);
           },
           released)
      .def("look_up_bags", &look_up_bags, released)
      .def("decode",
           [](const dybit::CodedTable& self, uintptr_t out, int threads) {
             dybit::decode_rows(self, writable<float>(out), threads);
           },
           released);
  nb::class_<dybit::ConvTransposed>(m, "ConvTransposed")
      .def(nb::new_([](std::vector<const dybit::PackedWeight*> weights, const std::array<dybit::Extent, 4>& extents,
                       int channels, int groups) {
        const auto& [kernel, stride, dilation, before] = extents;
        return new dybit::ConvTransposed(std::move(weights),
                                         {kernel, stride, dilation, before, {}, channels, groups, false});
      }))
      .def("run", &convolve_transposed, released);
  m.def("recur", &recur, released);
}
