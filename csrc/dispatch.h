// Chooses the instruction set that runs. Only this file asks the processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace dybit {

// The sets that this processor has and that agreed with the scalar one at load, the fastest last.
const std::vector<const Kernels*>& available();

// The set in use: the fastest, or the one that DYBIT_ISA names.
const Kernels& kernels();

// Switches to another set. Throws std::invalid_argument if it is not available.
void use(const std::string& name);

}  // namespace dybit
