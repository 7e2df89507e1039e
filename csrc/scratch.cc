#include "scratch.h"

namespace dybit {

Scratch::Scratch() = default;
Scratch::~Scratch() = default;

uint8_t* Scratch::bytes(size_t count) {
  constexpr size_t kAlignment = 64, kSpare = 64;  // whole registers may be read at the end
  const size_t needed = count + kAlignment + kSpare;
  if (memory_.size() < needed) {
    memory_.clear();  // nothing to move
    memory_.resize(needed);
  }
  return memory_.data() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.data()) % kAlignment) % kAlignment;
}

}  // namespace dybit
