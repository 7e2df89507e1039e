// Decoders in the Python module. It takes addresses, sizes and tuples.
#include <nanobind/stl/optional.h>

#include "decoder.h"
#include "module_parts.h"

namespace nb = nanobind;

namespace {

using dybit::Decoder;

// Addresses of weight and bias (0: none), epsilon, whether it is a root mean square, what is added to the weight.
using Norm = std::tuple<uintptr_t, uintptr_t, float, bool, float>;

std::optional<dybit::DecoderNorm> norm(const std::optional<Norm>& n) {
  if (!n) return std::nullopt;
  const auto& [weight, bias, eps, root_mean_square, shift] = *n;
  return dybit::DecoderNorm{pointer<float>(weight), pointer<float>(bias), eps, root_mean_square, shift};
}

std::vector<dybit::Product> products(const std::vector<Passed>& passed) {
  std::vector<dybit::Product> result;
  for (const Passed& p : passed) result.push_back(product(p));
  return result;
}

// The weight or the address of FP32 rows, and the number of rows.
using Table = std::tuple<const dybit::PackedWeight*, uintptr_t, int64_t>;

dybit::EmbeddingTable table(const Table& t) {
  return {std::get<0>(t), pointer<float>(std::get<1>(t)), std::get<2>(t)};
}

// Hidden and intermediate width, heads, heads of keys, numbers of a head, rotary pairs, whether attention and MLP are
// parallel, rows at a time. Scale of embeddings and cap of logits.
Decoder* make(const std::array<int, 8>& sizes, const Table& tokens, const Table& positions,
              const std::optional<Norm>& last, const std::optional<Passed>& head, float embedding_scale,
              float logit_cap) {
  const auto& [hidden, intermediate, heads, kv_heads, head_size, pairs, parallel, chunk] = sizes;
  std::optional<dybit::Product> head_product;
  if (head) head_product = product(*head);
  return new Decoder({hidden, intermediate, heads, kv_heads, head_size, pairs, parallel != 0, chunk}, table(tokens),
                     embedding_scale, table(positions), norm(last), head_product, logit_cap);
}

// norms: before and after attention, before and after the MLP, of queries and keys. numbers: activation, window,
// rotary table, and whether the MLP has a gate. attention: scale and cap of scores.
void add(Decoder& self, const std::array<std::optional<Norm>, 6>& norms, const std::vector<Passed>& inputs,
         const Passed& out, const std::vector<Passed>& gates, const Passed& down, const std::array<int, 4>& numbers,
         const std::array<float, 2>& attention) {
  const auto& [activation, window, rotary, gated] = numbers;
  self.add({norm(norms[0]), norm(norms[1]), norm(norms[2]), norm(norms[3]), norm(norms[4]), norm(norms[5]),
            products(inputs), product(out), products(gates), gated != 0, product(down),
            dybit::Activation(activation), attention[0], attention[1], window, rotary});
}

void run(Decoder& self, const std::array<int64_t, 2>& sizes, uintptr_t tokens, uintptr_t embeddings,
         const Strided& positions, uintptr_t starts, const std::vector<dybit::KVCache*>& caches, uintptr_t hidden,
         uintptr_t logits, int64_t logit_rows, int threads) {
  const dybit::DecoderInput input{int(sizes[0]), sizes[1], pointer<int64_t>(tokens), pointer<float>(embeddings),
                                  pointer<int64_t>(std::get<0>(positions)), std::get<1>(positions),
                                  pointer<int32_t>(starts)};
  self.run(input, caches, {writable<float>(hidden), writable<float>(logits), logit_rows}, threads);
}

}  // namespace

void define_decoder(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::new_(&make), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg())
      .def("add", &add)
      .def("set_rotary",
           [](Decoder& self, int index, uintptr_t cosine, uintptr_t sine, int64_t places) {
             self.set_rotary(index, {pointer<float>(cosine), pointer<float>(sine), places});
           })
      .def("run", &run, released);
  m.def("left_padding",
        [](uintptr_t mask, int64_t sequences, int64_t length, uintptr_t starts) {
          return dybit::left_padding(pointer<int64_t>(mask), sequences, length, writable<int32_t>(starts));
        });
}
