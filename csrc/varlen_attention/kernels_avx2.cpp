// The loops for AVX2. Headers come first: what they define must not be compiled for this target.
#if defined(__x86_64__)
#include <math.h>

#include <cstdint>

#include "varlen_attention/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define ATTENTION_KERNELS attention_kernels_avx2
#define ATTENTION_KERNELS_NAME "avx2"
#define WIDTH 8
#define TILE_ROWS 4
#include "varlen_attention/kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
