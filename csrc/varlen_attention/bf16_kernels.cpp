// Compiles bf16_impl.h for AVX-512 BF16 and for AMX, and selects one of them at run time. As in for_each_simd_target.h,
// every header that the loops need is included first, so that none of its functions is compiled for AMX.
#include <math.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "varlen_attention/kernels.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own intrinsics (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIMD_FLOATS 16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#define SIMD_TARGET avx512_bf16
#define SIMD_NAME "avx512_bf16"
#define SIMD_AMX 0
#include "varlen_attention/bf16_impl.h"
#undef SIMD_TARGET
#undef SIMD_NAME
#undef SIMD_AMX
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,avx2,fma,prefer-vector-width=512")
#endif
#define SIMD_TARGET amx
#define SIMD_NAME "amx"
#define SIMD_AMX 1
#include "varlen_attention/bf16_impl.h"
#undef SIMD_TARGET
#undef SIMD_NAME
#undef SIMD_AMX
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace delib_fast::attention {
namespace {

bool supports_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __builtin_cpu_init();  // also checks that the system saves the registers
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) != 0;
}

// Whether the processor has AMX with bfloat16, and Linux lets this process use the tile registers.
bool supports_amx() {
  constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool has = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) != 0 && (d >> 24 & 1) != 0;
  return has && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// ONEDNN_MAX_CPU_ISA, which limits the GEMMs of torch, limits these loops too.
bool allows(const char* amx_or_bf16) {
  const char* limit = std::getenv("ONEDNN_MAX_CPU_ISA");
  if (limit == nullptr || std::strcmp(limit, "DEFAULT") == 0) return true;
  return std::strstr(limit, "AMX") != nullptr || std::strstr(limit, amx_or_bf16) != nullptr;
}

const Bf16Kernels* select() {
  if (!allows("BF16") || !supports_avx512_bf16()) return nullptr;
  return allows("AMX") && supports_amx() ? &amx::BF16_KERNELS : &avx512_bf16::BF16_KERNELS;
}

}  // namespace

const Bf16Kernels* bf16_kernels() {
  static const Bf16Kernels* selected = select();
  return selected;
}

}  // namespace delib_fast::attention

#else

namespace delib_fast::attention {
const Bf16Kernels* bf16_kernels() { return nullptr; }
}  // namespace delib_fast::attention

#endif
