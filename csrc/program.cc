#include "program.h"

#include <algorithm>
#include <chrono>

#include "pool.h"
#include "scratch.h"

namespace dybit {
namespace {

constexpr size_t kAlignment = 64, kSpare = 256;  // kernels may read whole registers at the end

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

void Program::add(Step step) {
  parts_.emplace_back();
  parts_.back().single = std::move(step);
}

void Program::add(int64_t rows, RowStep step) {
  if (!open_) begin_rows(rows, rows, 0);
  parts_.back().steps.push_back(std::move(step));
  if (parts_.back().block == rows) open_ = false;
}

void Program::begin_rows(int64_t rows, int64_t block, size_t local_bytes) {
  parts_.emplace_back();
  parts_.back().rows = rows, parts_.back().block = block, parts_.back().local_bytes = local_bytes;
  open_ = true;
}

void Program::end_rows() { open_ = false; }

bool Program::Part::run(const Memory& memory, int threads, double* seconds) const {
  const double start = seconds ? now() : 0;
  if (single || block == rows) {
    bool done = true;
    if (single) done = single(memory, threads);
    for (const RowStep& step : steps) step(memory, {0, rows}, threads);
    if (seconds) seconds[0] = now() - start;
    return done;
  }
  // The time of each step is its share of the time of all blocks.
  std::mutex mutex;
  std::vector<double> spent(steps.size());
  parallel_for(int((rows + block - 1) / block), threads, [&](int i) {
    static thread_local Scratch local_memory;
    const Memory own = memory.with_local(local_memory.take<uint8_t>(local_bytes + kSpare));
    const RowRange range{i * block, std::min(block, rows - i * block)};
    for (size_t s = 0; s < steps.size(); ++s) {
      const double before = seconds ? now() : 0;
      steps[s](own, range, 1);
      if (!seconds) continue;
      std::lock_guard<std::mutex> lock(mutex);
      spent[s] += now() - before;
    }
  });
  if (seconds) {
    const double whole = now() - start;
    double sum = 0;
    for (double s : spent) sum += s;
    for (size_t s = 0; s < steps.size(); ++s) seconds[s] = sum > 0 ? spent[s] / sum * whole : 0;
  }
  return true;
}

Program::Arena Program::take() const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.empty()) return Arena(new uint8_t[arena_bytes_ + kAlignment + kSpare]());
  Arena arena = std::move(idle_.back());
  idle_.pop_back();
  return arena;
}

bool Program::run(const std::vector<uintptr_t>& tensors, int threads, double* seconds) const {
  Arena arena = take();
  const auto start = reinterpret_cast<uintptr_t>(arena.get());
  std::vector<uint8_t*> slots{reinterpret_cast<uint8_t*>((start + kAlignment - 1) / kAlignment * kAlignment)};
  for (uintptr_t tensor : tensors) slots.push_back(reinterpret_cast<uint8_t*>(tensor));
  const Memory memory(std::move(slots));
  bool done = true;
  for (size_t i = 0; done && i < parts_.size(); ++i) {
    done = parts_[i].run(memory, threads, seconds);
    if (seconds) seconds += parts_[i].single ? 1 : parts_[i].steps.size();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(arena));
  return done;
}

}  // namespace dybit
