// The parts of the Python module that lie in files of their own.
#pragma once

#include <nanobind/nanobind.h>

void define_rows(nanobind::module_& m);
