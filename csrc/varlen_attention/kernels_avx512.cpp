// The loops for AVX512. Headers come first: what they define must not be compiled for this target.
#if defined(__x86_64__)
#include <math.h>

#include <cstdint>

#include "varlen_attention/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif

#define ATTENTION_KERNELS attention_kernels_avx512
#define ATTENTION_KERNELS_NAME "avx512"
#define WIDTH 16
#define TILE_ROWS 8
#include "varlen_attention/kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
