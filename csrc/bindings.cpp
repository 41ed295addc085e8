// delib_fast._C, the only PYBIND11_MODULE of the project.
//
// Tensor ops are not bound here. Their schemas are defined in Python (delib_fast/ops), and their kernels are registered
// by TORCH_LIBRARY_IMPL when this module is loaded. The only function bound here is the pack planner, which takes no
// tensors.
#include <pybind11/pybind11.h>

#include "packing/packing.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of delib_fast; importing it registers the CPU kernels of torch.ops.delib_fast.";
  m.attr("interface") = 4;  // must equal INTERFACE in delib_fast/ops/_library.py; increment both when a schema changes
  register_packing(m);
}
