// The loops for any processor, and the choice between the tables.
#define ATTENTION_KERNELS attention_kernels_generic
#define ATTENTION_KERNELS_NAME "generic"
#define WIDTH 4
#define TILE_ROWS 4
#include "varlen_attention/kernels_impl.h"

namespace delib_fast::attention {

#if defined(__x86_64__)
extern const Kernels attention_kernels_avx512;
extern const Kernels attention_kernels_avx2;
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return attention_kernels_avx512;
  if (avx2) return attention_kernels_avx2;
#endif
  return attention_kernels_generic;
}

}  // namespace delib_fast::attention
