// What a machine can do at most, for the floors that benchmarks state. Must not know Python or torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dybit {

// Reads memory once, in order, as the kernels read weights; returns a sum of it, so that it is not left out.
uint64_t read_all(const uint8_t* memory, size_t bytes, int threads);

// Multiplies bytes in registers alone, with the instruction of the chosen kernels; returns how many products, 0 where
// there is no such instruction.
int64_t multiply_bytes(int64_t count, int threads);

}  // namespace dybit
