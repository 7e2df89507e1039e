// The part of the Python module with functions of FP32 rows. It takes addresses, strides and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "attention.h"
#include "elementwise.h"
#include "module_parts.h"
#include "norm.h"
#include "pooling.h"

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

// Address and strides of batch, head and token.
using Heads = std::tuple<uintptr_t, std::array<int64_t, 3>>;

// sizes: batch, heads, kv_heads, queries, keys, head_size, value_size. mask: address, whether it is boolean, and strides
// of batch, head, query and key.
void attention(const std::array<int, 7>& sizes, const Heads& q, const Heads& k, const Heads& v, float scale,
               bool causal, int causal_offset, const std::tuple<uintptr_t, bool, std::array<int64_t, 4>>& mask,
               const Heads& out, int threads) {
  dybit::AttentionTask task{};
  auto strides_of = [](const Heads& heads, int64_t* strides) {
    std::copy_n(std::get<1>(heads).begin(), 3, strides);
    return std::get<0>(heads);
  };
  task.q = pointer<float>(strides_of(q, task.q_strides));
  task.k = pointer<float>(strides_of(k, task.k_strides));
  task.v = pointer<float>(strides_of(v, task.v_strides));
  task.out = writable<float>(strides_of(out, task.out_strides));
  std::tie(task.batch, task.heads, task.kv_heads, task.queries, task.keys, task.head_size, task.value_size) =
      std::tuple_cat(sizes);
  task.scale = scale, task.causal = causal, task.causal_offset = causal_offset;
  const auto& [mask_at, is_boolean, mask_strides] = mask;
  if (is_boolean)
    task.bool_mask = pointer<uint8_t>(mask_at);
  else
    task.mask = pointer<float>(mask_at);
  std::copy_n(mask_strides.begin(), 4, task.mask_strides);
  dybit::attention(task, threads);
}

void unary(int kind, uintptr_t x, int64_t count, uintptr_t y, int threads) {
  dybit::unary(dybit::Unary(kind), pointer<float>(x), count, writable<float>(y), threads);
}

void clamp(uintptr_t x, int64_t count, float low, float high, uintptr_t y, int threads) {
  dybit::clamp(pointer<float>(x), count, low, high, writable<float>(y), threads);
}

using Triple = std::array<int64_t, 3>;
using Spread = std::tuple<uintptr_t, Triple>;  // address and strides

void binary(int kind, const Triple& sizes, const Spread& a, const Spread& b, const Spread& y, int threads) {
  auto operand = [](const Spread& s) { return dybit::Operand{pointer<float>(std::get<0>(s)), std::get<1>(s)}; };
  dybit::binary(dybit::Binary(kind), sizes, operand(a), operand(b), writable<float>(std::get<0>(y)), std::get<1>(y),
                threads);
}

void softmax(uintptr_t x, int64_t rows, int columns, uintptr_t y, int threads) {
  dybit::softmax(pointer<float>(x), rows, columns, writable<float>(y), threads);
}

using Pair = std::array<int, 2>;

// sizes: images, channels, and height and width of x and of y.
dybit::PoolTask pool_task(const std::array<int, 6>& sizes, const Spread& x, const Spread& y) {
  return {sizes[0],
          sizes[1],
          {sizes[2], sizes[3]},
          {sizes[4], sizes[5]},
          pointer<float>(std::get<0>(x)),
          std::get<1>(x),
          writable<float>(std::get<0>(y)),
          std::get<1>(y)};
}

// window: kernel, stride, padding and dilation.
void max_pool(const std::array<int, 6>& sizes, const Spread& x, const Spread& y, const std::array<Pair, 4>& window,
              int threads) {
  dybit::max_pool(pool_task(sizes, x, y), {window[0], window[1], window[2], window[3]}, threads);
}

void average_pool(const std::array<int, 6>& sizes, const Spread& x, const Spread& y, const std::array<Pair, 3>& window,
                  bool count_include_pad, int divisor, int threads) {
  dybit::average_pool(pool_task(sizes, x, y), {window[0], window[1], window[2], {1, 1}}, count_include_pad, divisor,
                      threads);
}

void adaptive_average_pool(const std::array<int, 6>& sizes, const Spread& x, const Spread& y, int threads) {
  dybit::adaptive_average_pool(pool_task(sizes, x, y), threads);
}

}  // namespace

void define_rows(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  m.def("norm", &norm, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
        nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), released);
  m.def("attention", &attention, released);
  m.def("unary", &unary, released);
  m.def("clamp", &clamp, released);
  m.def("binary", &binary, released);
  m.def("softmax", &softmax, released);
  m.def("max_pool", &max_pool, released);
  m.def("average_pool", &average_pool, released);
  m.def("adaptive_average_pool", &adaptive_average_pool, released);
}
