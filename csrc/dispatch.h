// Which instruction set runs. The only place that asks the processor.
#pragma once

#include <string>
#include <vector>

#include "weight.h"

namespace dybit {

// Those that this processor has and that agreed with the scalar one at load, best last.
const std::vector<const Kernels*>& available();

// The one in use: the best, or what DYBIT_ISA names.
const Kernels& kernels();

// Switches it. Throws std::invalid_argument if it is not available.
void use(const std::string& name);

}  // namespace dybit
