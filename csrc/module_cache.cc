// Caches of keys and values in the Python module.
#include <algorithm>

#include "kv_cache.h"
#include "module_parts.h"

namespace nb = nanobind;

namespace {

using dybit::KVCache;

// Address, and the strides of head and token.
using Heads = std::tuple<uintptr_t, std::array<int64_t, 2>>;

template <class T>
void take(const Heads& from, T*& data, int64_t* strides) {
  data = reinterpret_cast<T*>(std::get<0>(from));
  std::copy_n(std::get<1>(from).begin(), 2, strides);
}

// Sequence, tokens, keys and values.
using Rows = std::tuple<int, int, Heads, Heads>;

void append(KVCache& self, const std::vector<Rows>& given, int threads) {
  std::vector<dybit::CacheRows> rows(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    rows[i].sequence = std::get<0>(given[i]), rows[i].count = std::get<1>(given[i]);
    take(std::get<2>(given[i]), rows[i].keys, rows[i].key_strides);
    take(std::get<3>(given[i]), rows[i].values, rows[i].value_strides);
  }
  self.append(rows.data(), int(rows.size()), threads);
}

// Sequence, tokens, the first token seen, queries and results.
using Queries = std::tuple<int, int, int, Heads, Heads>;

void attend(const KVCache& self, const std::vector<Queries>& given, int heads, float scale, int window, float soft_cap,
            int threads) {
  std::vector<dybit::CacheQueries> queries(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    dybit::CacheQueries& q = queries[i];
    q.sequence = std::get<0>(given[i]), q.count = std::get<1>(given[i]), q.start = std::get<2>(given[i]);
    take(std::get<3>(given[i]), q.q, q.q_strides);
    take(std::get<4>(given[i]), q.out, q.out_strides);
  }
  self.attend(queries.data(), int(queries.size()), {heads, scale, window, soft_cap}, threads);
}

// Bits (32: FP32, 16: BF16), levels of each book, reaches, centred.
using Format = std::tuple<int, std::vector<std::vector<float>>, std::vector<float>, bool>;

dybit::CacheFormat format(const Format& f) { return {std::get<0>(f), std::get<1>(f), std::get<2>(f), std::get<3>(f)}; }

// Tokens of a group of keys, channels of a group of values, residual, whether keys are rotated, and values.
using Options = std::tuple<int, int, int, bool, bool>;

KVCache* make(int kv_heads, int key_size, int value_size, const Format& keys, const Format& values,
              const Options& options) {
  const auto& [key_group, value_group, residual, rotate_keys, rotate_values] = options;
  return new KVCache({kv_heads, key_size, value_size}, {format(keys), format(values), key_group, value_group, residual,
                                                        rotate_keys, rotate_values});
}

}  // namespace

void define_cache(nb::module_& m) {
  const auto released = nb::call_guard<nb::gil_scoped_release>();
  nb::class_<KVCache>(m, "KVCache")
      .def(nb::new_(&make))
      .def_prop_ro("sequences", &KVCache::sequences)
      .def_prop_ro("nbytes", &KVCache::bytes)
      .def("length", &KVCache::length)
      .def("copy", [](const KVCache& self) { return new KVCache(self); })
      .def("reset", &KVCache::reset)
      .def("append", &append, released)
      .def("attend", &attend, released)
      .def("crop", &KVCache::crop)
      .def("reorder", &KVCache::reorder)
      .def("read",
           [](const KVCache& self, int sequence, uintptr_t keys, uintptr_t values) {
             self.read(sequence, writable<float>(keys), writable<float>(values));
           },
           released);
}
