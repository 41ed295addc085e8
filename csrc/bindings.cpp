// The only PYBIND11_MODULE of the project: delib_fast._C.
//
// Tensor ops are not bound here: their schemas are defined in Python (delib_fast/ops/_library.py) and their
// kernels register themselves with TORCH_LIBRARY_IMPL when this module is loaded. What is bound here is no
// tensor op: the planner of packs.
#include <pybind11/pybind11.h>

#include "packing/packing.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of delib_fast; importing it registers the CPU kernels of torch.ops.delib_fast.";
  m.attr("interface") = 1;  // as INTERFACE in delib_fast/ops/_library.py: count both up where a schema changes
  register_packing(m);
}
