// The pack planner: best-fit decreasing bin packing over a whole dataset, in nearly linear time.
//
// `plan_packs` does not depend on Python; `register_packing` binds it. The Python reference in
// delib_fast/data/pack/packing.py is the definition: both return the same plan, pack by pack.
#pragma once

#include <cstdint>
#include <vector>

#include <pybind11/pybind11.h>

namespace delib_fast {

struct Plan {
  std::vector<int64_t> pack_offsets;  // (P+1,) the start of each pack in `examples`
  std::vector<int64_t> examples;      // (N,) example indices in the order of the packs
};

// lengths: N values, each in 1 … capacity (checked by the caller); capacity ≤ 2^24; N < 2^31.
Plan plan_packs(const int32_t* lengths, int64_t N, int32_t capacity, uint64_t seed);

}  // namespace delib_fast

void register_packing(pybind11::module_& m);
