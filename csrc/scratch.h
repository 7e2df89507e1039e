// Memory that a thread keeps between calls. The first touch of fresh memory often costs more than the work on it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "target.h"

namespace dybit {

// Declare it `static thread_local` and name it after what it holds.
class Scratch {
 public:
  Scratch();
  ~Scratch();

  // Memory for `count` numbers, aligned to 64 bytes. What an earlier call wrote may be lost.
  template <class T>
  DYBIT_INLINE T* take(size_t count) {
    return reinterpret_cast<T*>(bytes(count * sizeof(T)));
  }

 private:
  // Not inline: code for one instruction set must not be linked into another.
  uint8_t* bytes(size_t count);

  std::vector<uint8_t> memory_;
};

}  // namespace dybit
