// The loops for any processor, and the choice between the tables.
#define ROW_KERNELS row_kernels_generic
#define ROW_KERNELS_NAME "generic"
#include "linear_cross_entropy/row_kernels_impl.h"

namespace delib_fast {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return row_kernels_avx512;
  if (avx2) return row_kernels_avx2;
#endif
  return row_kernels_generic;
}

}  // namespace delib_fast
