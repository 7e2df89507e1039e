// Programs in the Python module. Each method of the class adds a step.
#include <algorithm>

#include "attention.h"
#include "conv_transposed.h"
#include "copy.h"
#include "depthwise.h"
#include "elementwise.h"
#include "embedding.h"
#include "module_parts.h"
#include "norm.h"
#include "pooling.h"
#include "program.h"
#include "recurrent.h"
#include "scratch.h"

namespace nb = nanobind;

namespace {

using dybit::Memory;
using dybit::Program;

using At = std::tuple<int, int64_t>;  // a dybit::Place
dybit::Place place(const At& at) { return {std::get<0>(at), std::get<1>(at)}; }

// A place, kind, zeros before and after in three dimensions, channels, elements of a place.
using Picture = std::tuple<At, int, dybit::Extent, dybit::Extent, int, int>;

dybit::Image image(const Picture& p, const Memory& memory) {
  return {memory.at<uint8_t>(place(std::get<0>(p))), dybit::InputKind(std::get<1>(p)), std::get<2>(p), std::get<3>(p),
          std::get<4>(p),                            std::get<5>(p)};
}

// Rounds FP32 (batch, *size, channels), or planar (batch, channels, *size), to an image.
void round_image(Program& self, const At& x, int batch, const dybit::Extent& size, bool planar, const Rounded& format,
                 const Picture& out) {
  self.add([=, x = place(x), r = rounding(format)](const Memory& memory, int threads) {
    return dybit::round_to_image(memory.at<float>(x), batch, size, &r, false, image(out, memory), threads, planar);
  });
}

// Limits of results, and a dybit::Unary (-1: none), which goes without an addend.
using Ended = std::tuple<float, float, int>;

// A convolution of an image: results are added to `addend`, clamped, and stored as FP32, as an image, or both.
template <class T>
void convolve_image(Program& self, const T& conv, const Picture& x, int batch, const dybit::Extent& size, float scale,
                    const At& offset, const At& bias, const At& y, const At& addend, const Ended& ended,
                    const Picture& out, const Rounded& format) {
  self.add([=, &conv, offset = place(offset), bias = place(bias), y = place(y), addend = place(addend),
            r = rounding(format)](const Memory& memory, int threads) {
    const dybit::Image result = image(out, memory);
    const auto& [low, high, activation] = ended;
    dybit::Finish finish{memory.at<float>(y), memory.at<float>(addend), low, high, result.data ? &result : nullptr, r};
    if (activation >= 0) finish.activation = dybit::Unary(activation);
    return conv.run(image(x, memory), batch, size, scale, memory.at<float>(offset), memory.at<float>(bias), finish,
                    threads);
  });
}

// A place and the distance of its rows.
using Rows = std::tuple<At, int64_t>;

// Places of scale and offset, and the reach.
using Scaled = std::tuple<At, At, float>;

dybit::InputScale scale(const Scaled& s, const Memory& memory) {
  return {memory.at<float>(place(std::get<0>(s))), memory.at<float>(place(std::get<1>(s))), std::get<2>(s)};
}

// Some rounded rows of a weight's inputs.
dybit::RoundedRows rounded_rows(const dybit::PackedWeight& weight, const At& at, int64_t all,
                                const dybit::RowRange& rows, const Memory& memory) {
  const dybit::Place from = place(at);
  if (from.slot == dybit::Place::kLocal) return weight.rounded(rows.count, memory.at<void>(from));
  return weight.slice(weight.rounded(all, memory.at<void>(from)), int(rows.first), int(rows.count));
}

float* rows_at(const Rows& at, const dybit::RowRange& rows, const Memory& memory) {
  return memory.at<float>(place(std::get<0>(at)), rows, std::get<1>(at));
}

// Rounds rows for the weight, and for those that share its rows.
void round_rows(Program& self, const dybit::PackedWeight& weight, const Rows& x, int64_t all, const Scaled& scaled,
                const At& out) {
  self.add(all, [=, &weight](const Memory& memory, const dybit::RowRange& rows, int threads) {
    weight.round(rows_at(x, rows, memory), std::get<1>(x), scale(scaled, memory),
                 rounded_rows(weight, out, all, rows, memory), threads);
  });
}

// y = activation(rows · weightᵀ + bias) · factor + addend
void multiply(Program& self, const dybit::PackedWeight& weight, const At& given, int64_t all, const At& offset,
              const At& bias, int activation, const Rows& factor, const Rows& addend, const Rows& y) {
  self.add(all, [=, &weight](const Memory& memory, const dybit::RowRange& rows, int threads) {
    const dybit::LinearFinish finish{memory.at<float>(place(bias)),    dybit::Activation(activation),
                                     rows_at(factor, rows, memory), std::get<1>(factor),
                                     rows_at(addend, rows, memory), std::get<1>(addend)};
    weight.multiply(rounded_rows(weight, given, all, rows, memory), memory.at<float>(place(offset)), finish,
                    rows_at(y, rows, memory), std::get<1>(y), threads);
  });
}

// Weight and bias, epsilon, whether it is a root mean square, what is added to the weight.
using NormParameters = std::tuple<At, At, float, bool, float>;

// The norm of x + addend. Stores the sum and the result where they have places, and rounds the result for `consumer`.
void norm(Program& self, int64_t all, int columns, const Rows& x, const Rows& addend, const Rows& sum,
          const NormParameters& parameters, const Rows& y, const dybit::PackedWeight* consumer, const Scaled& scaled,
          const At& out) {
  self.add(all, [=](const Memory& memory, const dybit::RowRange& rows, int threads) {
    const auto& [weight, bias, eps, root_mean_square, shift] = parameters;
    const dybit::NormTask task{rows_at(x, rows, memory),
                               std::get<1>(x),
                               rows_at(addend, rows, memory),
                               std::get<1>(addend),
                               rows_at(sum, rows, memory),
                               std::get<1>(sum),
                               memory.at<float>(place(weight)),
                               memory.at<float>(place(bias)),
                               eps,
                               root_mean_square,
                               shift,
                               columns,
                               rows_at(y, rows, memory),
                               std::get<1>(y)};
    dybit::RoundedRows rounded{};
    if (consumer) rounded = rounded_rows(*consumer, out, all, rows, memory);
    dybit::norm(task, consumer, scale(scaled, memory), consumer ? &rounded : nullptr, int(rows.count), threads);
  });
}

// A place and the strides of batch, head and token.
using Heads = std::tuple<At, std::array<int64_t, 3>>;

// Batch, heads, heads of keys, queries, keys, size of a head, size of a value.
using HeadSizes = std::array<int, 7>;

// A place, whether it is of bool, and the strides of batch, head, query and key.
using Mask = std::tuple<At, bool, std::array<int64_t, 4>>;

void attention(Program& self, const Heads& q, const Heads& k, const Heads& v, const HeadSizes& sizes, float scale,
               bool causal, int causal_offset, const Mask& mask, const Heads& out) {
  self.add([=](const Memory& memory, int threads) {
    dybit::AttentionTask task{};
    auto take = [&](const Heads& from, auto*& data, int64_t* strides) {
      data = memory.at<float>(place(std::get<0>(from)));
      std::copy_n(std::get<1>(from).begin(), 3, strides);
    };
    take(q, task.q, task.q_strides);
    take(k, task.k, task.k_strides);
    take(v, task.v, task.v_strides);
    take(out, task.out, task.out_strides);
    task.batch = sizes[0], task.heads = sizes[1], task.kv_heads = sizes[2], task.queries = sizes[3];
    task.keys = sizes[4], task.head_size = sizes[5], task.value_size = sizes[6];
    task.scale = scale, task.causal = causal, task.causal_offset = causal_offset;
    const dybit::Place masked = place(std::get<0>(mask));
    if (std::get<1>(mask))
      task.bool_mask = memory.at<uint8_t>(masked);
    else
      task.mask = memory.at<float>(masked);
    std::copy_n(std::get<2>(mask).begin(), 4, task.mask_strides);
    dybit::attention(task, threads);
    return true;
  });
}

void unary(Program& self, int kind, const At& x, int64_t count, const At& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::unary(dybit::Unary(kind), memory.at<float>(place(x)), count, memory.at<float>(place(y)), threads);
    return true;
  });
}

void clamp(Program& self, const At& x, int64_t count, float low, float high, const At& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::clamp(memory.at<float>(place(x)), count, low, high, memory.at<float>(place(y)), threads);
    return true;
  });
}

using Triple = std::array<int64_t, 3>;
using Spread = std::tuple<At, Triple>;  // a place and strides

void binary(Program& self, int kind, const Triple& sizes, const Spread& a, const Spread& b, const Spread& y) {
  self.add([=](const Memory& memory, int threads) {
    auto operand = [&](const Spread& s) {
      return dybit::Operand{memory.at<float>(place(std::get<0>(s))), std::get<1>(s)};
    };
    dybit::binary(dybit::Binary(kind), sizes, operand(a), operand(b), memory.at<float>(place(std::get<0>(y))),
                  std::get<1>(y), threads);
    return true;
  });
}

void softmax(Program& self, const At& x, int64_t rows, int columns, const At& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::softmax(memory.at<float>(place(x)), rows, columns, memory.at<float>(place(y)), threads);
    return true;
  });
}

using Pair = std::array<int, 2>;

using PoolSizes = std::array<int, 6>;  // images, channels, height and width of x, and of y

dybit::PoolTask pool_task(const PoolSizes& sizes, const Spread& x, const Spread& y, const Memory& memory) {
  return {sizes[0],
          sizes[1],
          {sizes[2], sizes[3]},
          {sizes[4], sizes[5]},
          memory.at<float>(place(std::get<0>(x))),
          std::get<1>(x),
          memory.at<float>(place(std::get<0>(y))),
          std::get<1>(y)};
}

// window: kernel, stride, padding, dilation.
void max_pool(Program& self, const PoolSizes& sizes, const Spread& x, const Spread& y,
              const std::array<Pair, 4>& window) {
  self.add([=](const Memory& memory, int threads) {
    dybit::max_pool(pool_task(sizes, x, y, memory), {window[0], window[1], window[2], window[3]}, threads);
    return true;
  });
}

// window: kernel, stride, padding. A divisor of 0: the count of numbers.
void average_pool(Program& self, const PoolSizes& sizes, const Spread& x, const Spread& y,
                  const std::array<Pair, 3>& window, bool count_include_pad, int divisor) {
  self.add([=](const Memory& memory, int threads) {
    dybit::average_pool(pool_task(sizes, x, y, memory), {window[0], window[1], window[2], {1, 1}}, count_include_pad,
                        divisor, threads);
    return true;
  });
}

void adaptive_average_pool(Program& self, const PoolSizes& sizes, const Spread& x, const Spread& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::adaptive_average_pool(pool_task(sizes, x, y, memory), threads);
    return true;
  });
}

// Factors and shifts by column, and the limits of the results.
using ColumnScales = std::tuple<At, At, float, float>;

void scale_columns(Program& self, const At& x, int64_t rows, int columns, const ColumnScales& scales, const At& y) {
  self.add([=](const Memory& memory, int threads) {
    const auto& [factor, shift, low, high] = scales;
    dybit::scale_columns({columns, memory.at<float>(place(factor)), memory.at<float>(place(shift)), low, high},
                         memory.at<float>(place(x)), rows, memory.at<float>(place(y)), threads);
    return true;
  });
}

void fold_rows(Program& self, int kind, const Rows& x, int64_t rows, int columns, const At& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::fold_rows(dybit::Fold(kind), memory.at<float>(place(std::get<0>(x))), std::get<1>(x), rows, columns,
                     memory.at<float>(place(y)), threads);
    return true;
  });
}

// Rows of a table of codes. Stops the program if an index is not a row.
void look_up(Program& self, const dybit::CodedTable& table, const At& index, int64_t count, const At& y) {
  self.add([=, &table](const Memory& memory, int threads) {
    return dybit::look_up(table, memory.at<int64_t>(place(index)), count, memory.at<float>(place(y)), threads);
  });
}

// Rows of an FP32 table.
void look_up_plain(Program& self, const At& table, int64_t rows, int64_t columns, const At& index, int64_t count,
                   const At& y) {
  self.add([=](const Memory& memory, int threads) {
    return dybit::look_up(memory.at<float>(place(table)), rows, columns, memory.at<int64_t>(place(index)), count,
                          memory.at<float>(place(y)), threads);
  });
}

// A transposed convolution. Stops the program if a dynamic scale is not finite.
void convolve_transposed(Program& self, const dybit::ConvTransposed& conv, const At& x, int batch,
                         const dybit::Extent& size, const At& y, const dybit::Extent& places, const At& bias,
                         const Scaled& scaled, bool planar) {
  self.add([=, &conv](const Memory& memory, int threads) {
    const dybit::InputScale s = scale(scaled, memory);
    return conv.run({memory.at<float>(place(x)), batch, size, s.scale, s.offset, s.reach, planar}, places,
                    memory.at<float>(place(y)), memory.at<float>(place(bias)), threads);
  });
}

// h and c; c is null unless the cell is that of an LSTM.
using States = std::array<At, 2>;

// All steps of a recurrent layer, with the same sequences at each. Results may be null.
void recur(Program& self, int cell, const dybit::PackedWeight& weight, const At& bias, const Scaled& scaled,
           int64_t steps, int64_t count, bool reverse, const At& x, const States& first, const States& last,
           const At& y) {
  const std::vector<int64_t> counts(steps, count);
  self.add([=, &weight](const Memory& memory, int threads) {
    static thread_local dybit::Scratch state_memory;
    const int64_t all = count * weight.weight().columns;
    auto* states = state_memory.take<float>(2 * all);
    for (int i = 0; i < 2; ++i)
      if (const auto* from = memory.at<float>(place(first[i]))) std::copy_n(from, all, states + i * all);
    dybit::recur({dybit::Cell(cell), &weight, memory.at<float>(place(bias)), scale(scaled, memory), steps,
                  counts.data(), reverse, memory.at<float>(place(x)), states, states + all,
                  memory.at<float>(place(y))},
                 threads);
    for (int i = 0; i < 2; ++i)
      if (auto* to = memory.at<float>(place(last[i]))) std::copy_n(states + i * all, all, to);
    return true;
  });
}

using Sizes = std::array<int64_t, dybit::kCopyDimensions>;

using Layout = std::tuple<At, Sizes>;  // a place and strides

void copy(Program& self, const Sizes& sizes, int element_bytes, const Layout& x, const Layout& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::copy({sizes, std::get<1>(x), std::get<1>(y)}, element_bytes, memory.at<void>(place(std::get<0>(x))),
                memory.at<void>(place(std::get<0>(y))), threads);
    return true;
  });
}

void convert(Program& self, const Sizes& sizes, int x_type, const Layout& x, int y_type, const Layout& y) {
  self.add([=](const Memory& memory, int threads) {
    dybit::convert({sizes, std::get<1>(x), std::get<1>(y)}, dybit::Element(x_type),
                   memory.at<void>(place(std::get<0>(x))), dybit::Element(y_type),
                   memory.at<void>(place(std::get<0>(y))), threads);
    return true;
  });
}

}  // namespace

void define_program(nb::module_& m) {
  nb::class_<Program>(m, "Program")
      .def(nb::new_([](size_t arena_bytes) { return new Program(arena_bytes); }))
      .def("run",
           [](const Program& self, const std::vector<uintptr_t>& tensors, int threads, uintptr_t seconds) {
             return self.run(tensors, threads, writable<double>(seconds));
           },
           nb::call_guard<nb::gil_scoped_release>())
      .def("round_image", &round_image)
      .def("conv_image", &convolve_image<dybit::Conv>)
      .def("depthwise_image", &convolve_image<dybit::Depthwise>)
      .def("begin_rows", &Program::begin_rows)
      .def("end_rows", &Program::end_rows)
      .def("round_rows", &round_rows)
      .def("multiply", &multiply)
      .def("norm", &norm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg().none(), nb::arg(), nb::arg())
      .def("attention", &attention)
      .def("unary", &unary)
      .def("clamp", &clamp)
      .def("binary", &binary)
      .def("softmax", &softmax)
      .def("max_pool", &max_pool)
      .def("average_pool", &average_pool)
      .def("adaptive_average_pool", &adaptive_average_pool)
      .def("scale_columns", &scale_columns)
      .def("fold_rows", &fold_rows)
      .def("look_up", &look_up)
      .def("look_up_plain", &look_up_plain)
      .def("conv_transposed", &convolve_transposed)
      .def("recur", &recur)
      .def("copy", &copy)
      .def("convert", &convert);
}
