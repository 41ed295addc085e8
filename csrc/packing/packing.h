// Binds the planner of packs to Python.
#pragma once

#include <pybind11/pybind11.h>

void register_packing(pybind11::module_& m);
