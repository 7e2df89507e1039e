// A network as a list of steps on a plan of memory, run by one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace dybit {

// Where a step finds a tensor: at an offset in the arena or in a tensor that the caller passes, or at a fixed address.
struct Place {
  static constexpr int kLocal = -2, kFixed = -1, kArena = 0;  // the caller's tensors are counted from 1
  int slot;
  int64_t offset;  // in bytes; kFixed: the address, 0 for none; kLocal: in the memory of a block of rows
};

// Some rows of the tensors of a step.
struct RowRange {
  int64_t first, count;
};

// The memory of one run.
class Memory {
 public:
  explicit Memory(std::vector<uint8_t*> slots) : slots_(std::move(slots)) {}

  template <class T>
  T* at(const Place& place) const {
    if (place.slot == Place::kFixed) return reinterpret_cast<T*>(static_cast<uintptr_t>(place.offset));
    return reinterpret_cast<T*>((place.slot == Place::kLocal ? local_ : slots_[place.slot]) + place.offset);
  }

  // The first of some rows, which lie `stride` elements apart. Local memory has only these rows.
  template <class T>
  T* at(const Place& place, const RowRange& rows, int64_t stride) const {
    T* const start = at<T>(place);
    return start && place.slot != Place::kLocal ? start + rows.first * stride : start;
  }

  Memory with_local(uint8_t* local) const {
    Memory result = *this;
    result.local_ = local;
    return result;
  }

 private:
  std::vector<uint8_t*> slots_;
  uint8_t* local_ = nullptr;
};

// Threads may run one program at the same time: each run has an arena of its own, which later runs use again.
class Program {
 public:
  // Returns false if the step met a value that its integers cannot hold.
  using Step = std::function<bool(const Memory&, int threads)>;
  // A step whose results of a row depend on that row alone.
  using RowStep = std::function<void(const Memory&, const RowRange&, int threads)>;

  explicit Program(size_t arena_bytes) : arena_bytes_(arena_bytes) {}

  void add(Step step);
  void add(int64_t rows, RowStep step);

  // The steps between these two run one after the other on `block` rows at a time, so that what passes between them
  // stays in the cache. Each thread has `local_bytes` of memory for it.
  void begin_rows(int64_t rows, int64_t block, size_t local_bytes);
  void end_rows();

  // Runs the steps in order until one returns false, and returns whether all were run. `seconds` (or null) receives the
  // time of each step.
  bool run(const std::vector<uintptr_t>& tensors, int threads, double* seconds) const;

 private:
  using Arena = std::unique_ptr<uint8_t[]>;
  struct Part {  // steps on blocks of rows, or a single step
    std::vector<RowStep> steps;
    Step single;
    int64_t rows = 0, block = 0;
    size_t local_bytes = 0;

    bool run(const Memory& memory, int threads, double* seconds) const;
  };
  Arena take() const;

  const size_t arena_bytes_;
  std::vector<Part> parts_;
  bool open_ = false;  // between begin_rows and end_rows
  mutable std::mutex mutex_;
  mutable std::vector<Arena> idle_;
};

}  // namespace dybit
