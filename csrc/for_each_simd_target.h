// Compiles the loops in the file SIMD_LOOPS once per instruction set, and selects one of the results at run time.
//
// A source file includes every header that its loops need, defines SIMD_LOOPS and then includes this file. The order
// matters: a header that was first included below would be compiled for AVX-512, and its inline functions with it.
// SIMD_LOOPS is included once per target, with
//
//   SIMD_TARGET   the namespace that its code belongs in: generic, avx2 or avx512
//   SIMD_NAME     the same as a string
//   SIMD_FLOATS   float32 values in a vector register
//
// SIMD_SELECT(x) is then avx512::x, avx2::x or generic::x, the widest that the processor at run time supports.
//
// The loops must have internal linkage and must not call inline functions of a library. Otherwise the linker may keep
// the AVX-512 copy of such a function for every caller, and the program crashes on an older processor.
#pragma once

#define SIMD_TARGET generic
#define SIMD_NAME "generic"
#define SIMD_FLOATS 4
#include SIMD_LOOPS
#undef SIMD_TARGET
#undef SIMD_NAME
#undef SIMD_FLOATS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SIMD_TARGET avx2
#define SIMD_NAME "avx2"
#define SIMD_FLOATS 8
#include SIMD_LOOPS
#undef SIMD_TARGET
#undef SIMD_NAME
#undef SIMD_FLOATS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define SIMD_TARGET avx512
#define SIMD_NAME "avx512"
#define SIMD_FLOATS 16
#include SIMD_LOOPS
#undef SIMD_TARGET
#undef SIMD_NAME
#undef SIMD_FLOATS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace delib_fast {
namespace {

bool supports_avx512() {
  __builtin_cpu_init();
  static const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return supported;
}

bool supports_avx2() {
  __builtin_cpu_init();
  static const bool supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return supported;
}

}  // namespace
}  // namespace delib_fast

#define SIMD_SELECT(x) (supports_avx512() ? avx512::x : supports_avx2() ? avx2::x : generic::x)

#else

#define SIMD_SELECT(x) generic::x

#endif
