// The limits of the machine, for comparison in benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dybit {

// Reads memory once and in order, as the kernels read weights. Returns its sum, so that compilers keep the reads.
uint64_t read_all(const uint8_t* memory, size_t bytes, int threads);

// Multiplies bytes in registers with the instruction of the chosen kernels. Returns how many products; 0 without such
// an instruction.
int64_t multiply_bytes(int64_t count, int threads);

}  // namespace dybit
