// Compiles kernels_impl.h for each instruction set. for_each_simd_target.h explains the order of the includes.
#include "linear_kl_divergence/kernels.h"

#include <math.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SIMD_LOOPS "linear_kl_divergence/kernels_impl.h"
#include "for_each_simd_target.h"

namespace delib_fast {

const PairKernels& pair_kernels() { return SIMD_SELECT(PAIR_KERNELS); }

}  // namespace delib_fast
