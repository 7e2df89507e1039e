#include "attention.h"

#include <algorithm>

#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

// Up to so many rows, keys and values are read once and in place, because packing costs as much as the products.
constexpr int64_t kFewRows = 6;
constexpr int64_t kGrain = 48;  // rows of a piece of work

int64_t padded(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

}  // namespace

void attention(const AttentionTask& task, int threads) {
  const RowKernels& kernels = *dybit::kernels().rows;
  const int heads = task.batch * task.kv_heads;
  const int64_t rows = int64_t(task.queries) * (task.kv_heads ? task.heads / task.kv_heads : 0);
  if (heads == 0 || rows == 0) return;
  const int64_t products = int64_t(heads) * rows * task.keys * (task.head_size + task.value_size);
  if (products < 200000) threads = 1;
  const bool few = rows <= kFewRows && task.head_size % kLanes == 0 && task.value_size % kLanes == 0;
  const int64_t key_floats = padded(task.keys) * task.head_size;
  const int64_t head_floats = key_floats + task.keys * padded(task.value_size);
  auto head_in = [&](float* memory) { return PackedHead{memory, memory + key_floats}; };
  if (few || threads == 1 || heads >= 8 * threads)
    return parallel_for(heads, threads, [&](int i) {
      const int batch = i / task.kv_heads, kv_head = i % task.kv_heads;
      if (few) return kernels.attend(task, batch, kv_head, nullptr, 0, int(rows));
      static thread_local Scratch own_memory;
      const PackedHead head = head_in(own_memory.take<float>(size_t(head_floats)));
      kernels.pack_head(task, batch, kv_head, head);
      kernels.attend(task, batch, kv_head, &head, 0, int(rows));
    });
  static thread_local Scratch shared_memory;
  float* const memory = shared_memory.take<float>(size_t(heads * head_floats));
  parallel_for(heads, threads, [&](int i) {
    kernels.pack_head(task, i / task.kv_heads, i % task.kv_heads, head_in(memory + i * head_floats));
  });
  const int pieces = int((rows + kGrain - 1) / kGrain);
  parallel_for(heads * pieces, threads, [&](int i) {
    const int which = i / pieces;
    const PackedHead head = head_in(memory + which * head_floats);
    const int64_t first = i % pieces * kGrain;
    kernels.attend(task, which / task.kv_heads, which % task.kv_heads, &head, int(first),
                   int(std::min(rows, first + kGrain)));
  });
}

}  // namespace dybit
