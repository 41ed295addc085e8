// What softmax_gradient.cu uses of CUDA, on a CPU. The threads of a cluster are fibers of one thread of the system. They
// switch only at shuffles and barriers, and run in an adversarial order in between: random, forwards or backwards, and
// some lag behind.
//
// It finds out-of-bounds accesses (with ASan: shared memory and tensors are heap blocks of the exact size), reads of
// shared memory that no thread wrote (it is filled with NaN), reads of the shared memory of a block that has exited (it
// is filled with NaN again), lanes that are missing at a shuffle, threads that are missing at a barrier (a deadlock is
// reported), and launches beyond the limits of an H200. It does not model bank conflicts, the order of memory accesses
// inside a warp without a barrier, or the exact tanhf and log of a device.
#pragma once
#include <math.h>
#include <ucontext.h>
#include <algorithm>
#include <array>
#include <cassert>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef EMU_ARCH
#define EMU_ARCH 900
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

struct Limits {  // H200, CUDA 13
  int major = EMU_ARCH / 100, sm_shared = 233472, block_shared = 232448;
  int ptx = EMU_ARCH / 10;
};
inline Limits limits;
inline std::mt19937_64 rng{1};
inline long launches, switches, shuffles, barriers, cluster_barriers;
// The planted fault of emulator.py that is active; 0 for none.
inline int mutant = 0;
[[noreturn]] inline void fail(const char* why) { std::fprintf(stderr, "EMULATOR: %s\n", why); std::abort(); }

struct Block {
  unsigned index;
  std::vector<std::unique_ptr<char[]>> statics;  // by order of declaration
  std::vector<std::size_t> static_bytes;
  std::unique_ptr<char[]> dynamic;
  std::size_t dynamic_bytes = 0;
  long arrived = 0, generation = 0, alive = 0;
  std::vector<std::array<std::array<std::uint32_t, 32>, 2>> slots;  // of each warp
  std::vector<long> warp_arrived, warp_generation, warp_alive;
  bool left = false;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int thread;
  bool done = false;
  long static_use = 0, shuffle_count = 0, cluster_token = -1;
  std::function<bool()> ready;
  void* fake = nullptr;
};
inline constexpr std::size_t STACK = 128 << 10;
inline std::vector<std::unique_ptr<Block>> cluster;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline long cluster_arrived, cluster_generation, cluster_alive;
inline std::function<void()> entry;
inline unsigned block_threads;
#if defined(__SANITIZE_ADDRESS__)
inline const void* main_bottom; inline std::size_t main_size; inline void* main_fake;
#endif

inline void yield_until(std::function<bool()> ready) {
  ++switches;
  Fiber* self = current;
  self->ready = std::move(ready);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&self->fake, main_bottom, main_size);
#endif
  swapcontext(&self->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake, &main_bottom, &main_size);
#endif
}

inline void trampoline() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  entry();
  Fiber* self = current;
  self->done = true;
  Block* b = self->block;
  --b->alive, --b->warp_alive[self->thread / 32], --cluster_alive;
  if (self->cluster_token >= 0) fail("a thread left between barrier_arrive and barrier_wait");
  if (b->alive == 0) {  // the block has exited, and its shared memory may belong to another one
    b->left = true;
    for (std::size_t i = 0; i < b->statics.size(); ++i) std::memset(b->statics[i].get(), 0xff, b->static_bytes[i]);
    if (b->dynamic_bytes) std::memset(b->dynamic.get(), 0xff, b->dynamic_bytes);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, main_bottom, main_size);
#endif
  setcontext(&scheduler);
}

inline void* static_shared(std::size_t bytes) {
  Block* b = current->block;
  const long i = current->static_use++;
  if (i >= static_cast<long>(b->statics.size())) {
    b->statics.emplace_back(new char[bytes]);
    b->static_bytes.push_back(bytes);
    std::memset(b->statics.back().get(), 0xff, bytes);  // NaNs
  }
  if (b->static_bytes[i] != bytes) fail("threads disagree about shared declarations");
  return b->statics[i].get();
}

inline void block_barrier() {
  ++barriers;
  Block* b = current->block;
  const long mine = b->generation;
  if (++b->arrived == b->alive) b->arrived = 0, ++b->generation;  // exited threads count as arrived
  else yield_until([b, mine] { return b->generation != mine; });
  // every thread takes another turn, in a new order
  yield_until([] { return true; });
}
inline void warp_barrier() {
  Block* b = current->block;
  const int w = current->thread / 32;
  if (b->warp_alive[w] != 32) fail("a full-mask shuffle with lanes that have left");
  const long mine = b->warp_generation[w];
  if (++b->warp_arrived[w] == 32) b->warp_arrived[w] = 0, ++b->warp_generation[w];
  else yield_until([b, w, mine] { return b->warp_generation[w] != mine; });
}
inline void cluster_arrive() {
  ++cluster_barriers;
  if (current->cluster_token >= 0) fail("barrier_arrive twice");
  current->cluster_token = cluster_generation;
  if (++cluster_arrived == static_cast<long>(cluster.size()) * block_threads) cluster_arrived = 0, ++cluster_generation;
}
inline void cluster_wait() {
  const long mine = current->cluster_token;
  if (mine < 0) fail("barrier_wait without barrier_arrive");
  yield_until([mine] { return cluster_generation != mine; });
  current->cluster_token = -1;
}

template <typename T>
inline T shuffle_xor(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) == 4);
  if (mask != 0xffffffffu) fail("a shuffle with a partial mask is not emulated");
  ++shuffles;
  Block* b = current->block;
  const int w = current->thread / 32, lane = current->thread % 32, turn = current->shuffle_count++ % 2;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  b->slots[w][turn][lane] = bits;
  warp_barrier();
  bits = b->slots[w][turn][lane ^ distance];
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void run_cluster(unsigned first_block, unsigned blocks, unsigned threads, std::size_t dynamic_bytes,
                        const std::function<void()>& kernel) {
  entry = kernel;
  block_threads = threads;
  cluster.clear();
  fibers.clear();
  fibers.resize(blocks * threads);
  cluster_arrived = cluster_generation = 0;
  cluster_alive = blocks * threads;
  for (unsigned k = 0; k < blocks; ++k) {
    auto b = std::make_unique<Block>();
    b->index = first_block + k;
    b->dynamic_bytes = dynamic_bytes;
    b->dynamic.reset(new char[dynamic_bytes ? dynamic_bytes : 1]);  // malloc aligns to 16
    std::memset(b->dynamic.get(), 0xff, dynamic_bytes);
    b->alive = threads;
    b->slots.resize(threads / 32);
    b->warp_arrived.assign(threads / 32, 0), b->warp_generation.assign(threads / 32, 0);
    b->warp_alive.assign(threads / 32, 32);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = fibers[k * threads + t];
      f.stack.reset(new char[STACK]);
      f.block = b.get(), f.thread = t;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.get();
      f.context.uc_stack.ss_size = STACK;
      f.context.uc_link = nullptr;
      makecontext(&f.context, trampoline, 0);
    }
    cluster.push_back(std::move(b));
  }
  std::vector<unsigned> order(fibers.size());
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::size_t left = fibers.size();
  while (left) {
    switch (rng() % 3) {  // the adversary: random, forwards or backwards
      case 0: std::shuffle(order.begin(), order.end(), rng); break;
      case 1: std::sort(order.begin(), order.end()); break;
      default: std::sort(order.rbegin(), order.rend());
    }
    bool moved = false;
    for (unsigned i : order) {
      Fiber& f = fibers[i];
      if (f.done || (f.ready && !f.ready())) continue;
      if (rng() % 8 == 0 && moved) continue;  // some lag behind
      f.ready = nullptr;
      current = &f;
      moved = true;
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_start_switch_fiber(&main_fake, f.stack.get(), STACK);
#endif
      swapcontext(&scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
      __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
      if (f.done) --left;
    }
    if (!moved) fail("deadlock: threads wait at a barrier that others never reach");
  }
}

inline float fast_exp(float x) {  // __expf: ex2.approx(x * log2 e), off by up to 2 ulp, either way
  const float y = static_cast<float>(exp2(static_cast<double>(x * 1.44269504088896340736f)));
  if (!std::isfinite(y) || y == 0) return y;
  std::int32_t bits;
  std::memcpy(&bits, &y, 4);
  const std::int32_t off = bits + static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) * 2654435761u >> 30) - 2;
  float z;
  std::memcpy(&z, &off, 4);
  return off > 0 && std::isfinite(z) ? z : y;
}
}  // namespace emu

struct EmuIndex {
  struct X { operator unsigned() const { return emu::current->thread; } };
  X x;
};
struct EmuBlockIndex {
  struct X { operator unsigned() const { return emu::current->block->index; } };
  X x;
};
inline EmuIndex threadIdx;
inline EmuBlockIndex blockIdx;
#define __CUDA_ARCH__ EMU_ARCH
inline float __expf(float x) { return emu::fast_exp(x); }
inline void __syncthreads() { emu::block_barrier(); }
inline void __trap() { emu::fail("__trap"); }
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int distance) { return emu::shuffle_xor(mask, value, distance); }
inline float __builtin_nan_f() { return NAN; }
// emulator.py rewrites the three shared declarations of the kernel to these.
#define EMU_DYNAMIC(type, name) type* name = reinterpret_cast<type*>(emu::current->block->dynamic.get())
#define EMU_STATIC(type, name) type& name = *static_cast<type*>(emu::static_shared(sizeof(type)))

namespace cooperative_groups {
struct cluster_group {
  static void sync() { emu::cluster_arrive(); emu::cluster_wait(); emu::yield_until([] { return true; }); }
  static void barrier_arrive() { emu::cluster_arrive(); }
  static void barrier_wait() { emu::cluster_wait(); }
  template <typename T>
  static T* map_shared_rank(T* mine, int rank) {
    const emu::Block* b = emu::current->block;
    for (std::size_t i = 0; i < b->statics.size(); ++i) {
      char* base = b->statics[i].get();
      char* at = reinterpret_cast<char*>(mine);
      if (at < base || at >= base + b->static_bytes[i]) continue;
      emu::Block* other = emu::cluster.at(rank).get();
      if (other->left) emu::fail("distributed shared memory of a block that has left");
      if (i >= other->statics.size()) emu::fail("distributed shared memory of a block that has not begun");
      return reinterpret_cast<T*>(other->statics[i].get() + (at - base));
    }
    emu::fail("map_shared_rank of what is not shared");
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

// ---- the host side
template <typename... E, typename... A>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(E...), A&&... arguments) {
  ++emu::launches;
  unsigned per = 1;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) per = c->attrs[i].val.clusterDim.x;
  if (per > 1 && emu::limits.major < 9) return cudaErrorInvalidValue;
  if (per > 8 || c->gridDim.x % per || c->gridDim.x == 0 || c->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (c->dynamicSmemBytes + 272 > static_cast<std::size_t>(emu::limits.block_shared)) return cudaErrorInvalidValue;
  std::vector<unsigned> order(c->gridDim.x / per);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), emu::rng);
  for (unsigned i : order)
    emu::run_cluster(i * per, per, c->blockDim.x, c->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
template <typename... E>
inline cudaError_t cudaFuncSetAttribute(void (*)(E...), cudaFuncAttribute a, int value) {
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize && value + 272 > emu::limits.block_shared)
    return cudaErrorInvalidValue;
  return cudaSuccess;
}
template <typename... E>
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, void (*)(E...)) {
  *out = {};
  out->ptxVersion = emu::limits.ptx;
  return cudaSuccess;
}
inline cudaError_t emu_get_device(int* i) { *i = 0; return cudaSuccess; }
inline cudaError_t emu_attribute(int* value, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emu::limits.block_shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emu::limits.sm_shared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emu::limits.major; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
#define cudaGetDevice emu_get_device
#define cudaDeviceGetAttribute emu_attribute
inline const char* emu_error(cudaError_t e) { return e == cudaSuccess ? "no error" : "error"; }
#define cudaGetErrorString emu_error
