// The planner of packs: best-fit decreasing over a whole data set, in time near linear in its size.
//
// `plan_packs` knows no Python; `register_packing` binds it. The Python reference, which is the definition, is
// `_plan_in_python` in delib_fast/data/packing.py: both return the same plan, pack by pack.
#pragma once

#include <cstdint>
#include <vector>

#include <pybind11/pybind11.h>

namespace delib_fast {

struct Plan {
  std::vector<int64_t> pack_offsets;  // (P+1,) where each pack starts in `examples`
  std::vector<int64_t> examples;      // (N,) example indices, pack after pack
};

// lengths: N values, each in 1 … capacity (checked by the caller); capacity ≤ 2^24; N < 2^31.
Plan plan_packs(const int32_t* lengths, int64_t N, int32_t capacity, uint64_t seed);

}  // namespace delib_fast

void register_packing(pybind11::module_& m);
