#include "packing/packing.h"

void register_packing(pybind11::module_& m) {
  m.attr("packing_version") = 0;  // 0: this build has no planner; delib_fast.data plans in Python
}
