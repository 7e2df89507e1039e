#include "norm.h"

#include <algorithm>

#include "dispatch.h"
#include "pool.h"
#include "row_kernels.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr int kNumbers = 4096;  // of rows that are rounded while they are in the L1 cache
constexpr int64_t kPiece = 8 * kNumbers;

NormTask from(NormTask task, int row) {
  task.x += row * task.x_stride;
  if (task.addend) task.addend += row * task.addend_stride;
  if (task.sum) task.sum += row * task.sum_stride;
  if (task.y) task.y += row * task.y_stride;
  return task;
}

}  // namespace

void norm(const NormTask& task, const PackedWeight* consumer, const InputScale& scale, const RoundedRows* rounded,
          int rows, int threads) {
  const RowKernels& kernels = *(consumer ? consumer->kernels() : dybit::kernels()).rows;
  const int columns = std::max(task.columns, 1), grain = std::max(1, kNumbers / columns);
  auto some = [&](int first, int count) {
    NormTask part = from(task, first);
    if (!part.y) {
      static thread_local Scratch norm_memory;
      part.y = norm_memory.take<float>(size_t(count) * columns);
      part.y_stride = columns;
    }
    kernels.norm(part, count);
    if (consumer) consumer->round(part.y, part.y_stride, scale, consumer->slice(*rounded, first, count), 0, count);
  };
  const int piece = int(std::max<int64_t>(grain, kPiece / columns));
  parallel_for((rows + piece - 1) / piece, threads, [&](int i) {
    const int end = std::min(rows, (i + 1) * piece);
    for (int first = i * piece; first < end; first += grain) some(first, std::min(grain, end - first));
  });
}

}  // namespace dybit
