// The loops for AVX-512. Headers come first: what they define must not be compiled for this target.
#if defined(__x86_64__)
#include <math.h>

#include <cstdint>

#include "linear_cross_entropy/row_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#define ROW_KERNELS row_kernels_avx512
#define ROW_KERNELS_NAME "avx512"
#include "linear_cross_entropy/row_kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
