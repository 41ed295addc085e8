// Computes the losses of one chunk of logits (C, V), and replaces the logits with their gradient.
//
// Each row is processed by a cluster of 1, 2 or 4 thread blocks, and each block processes one slice of the row. A block
// reads its slice from HBM once, copies it to shared memory and computes its softmax statistics. The blocks of a
// cluster exchange their statistics through distributed shared memory. Each block then computes dz from shared memory
// and overwrites its slice. HBM traffic is therefore 4 bytes per bfloat16 logit: one read and one write.
//
// Clusters need sm_90. Without them (sm_80) one block processes the whole row, and the part that does not fit shared
// memory is read a second time, mostly from L2. The ends of a slice that are not aligned to 16 bytes, fewer than 8
// entries each, are also read twice. Besides dz the kernel writes nll, correct and, if requested, loss, at the position
// of the row. An unsupervised row is not read; its gradient is zero. The arithmetic is in row_math.h.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "linear_cross_entropy/row_math.h"

namespace delib_fast {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int UNROLL = 4;  // vectors in flight per thread: 32 KiB per block
constexpr int MAX_BLOCKS_PER_ROW = 4;

struct Arguments {
  void* logits;                   // (C, V) with rows `row_stride` apart; 16-byte alignment is not required
  const std::int64_t* positions;  // (C,) indices into the arrays of length T
  const std::int64_t* targets;    // (T,)
  const float* weights;           // (T,), or null for weights of 1
  float* nll;                     // (T,)
  float* loss;                    // (T,), or null if not requested
  std::uint8_t* correct;          // (T,)
  std::int64_t vocabulary;
  std::int64_t row_stride;  // elements between the starts of two rows: at least the vocabulary
  std::int64_t ignore_index;
  RowOptions<float> options;
  int cached_vectors;  // the number of vectors of a slice that are kept in shared memory
  bool need_gradient;
};

// ---- device helpers

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void round_to(float* to, float x) { *to = x; }
__device__ __forceinline__ void round_to(__nv_bfloat16* to, float x) { *to = __float2bfloat16_rn(x); }
__device__ __forceinline__ void round_to(__half* to, float x) { *to = __float2half_rn(x); }

template <typename scalar_t>
union Vector {
  static constexpr int WIDTH = 16 / sizeof(scalar_t);
  uint4 raw;
  scalar_t at[WIDTH];
  __device__ Vector() {}
};

__device__ __forceinline__ Statistics shuffled(const Statistics& s, int distance) {
  Statistics other;
  other.max = __shfl_xor_sync(0xffffffffu, s.max, distance);
  other.sum = __shfl_xor_sync(0xffffffffu, s.sum, distance);
  other.total = __shfl_xor_sync(0xffffffffu, s.total, distance);
  other.argmax = __shfl_xor_sync(0xffffffffu, s.argmax, distance);
  return other;
}

__device__ __forceinline__ Statistics warp_total(Statistics s) {
  for (int distance = 16; distance > 0; distance /= 2) s = merge(s, shuffled(s, distance));
  return s;
}

// The loops of one block over its slice of a row.
template <typename scalar_t, Terms TERMS>
struct SliceWalker {
  using Vec = Vector<scalar_t>;
  scalar_t* row;
  uint4* cache;
  const Arguments& a;
  Slice slice;
  float inverse_softcap;  // unused without a softcap

  __device__ float logit(scalar_t z) const { return final_logit<TERMS>(widen(z), a.options, inverse_softcap); }

  __device__ uint4* vector_at(std::int32_t v) const { return reinterpret_cast<uint4*>(row + slice.head_end) + v; }

  // The unaligned entry that this thread processes (thread i takes the i-th one), or -1 if there is none.
  __device__ std::int32_t unaligned_entry() const {
    const std::int32_t thread = static_cast<std::int32_t>(threadIdx.x);
    const std::int32_t head = slice.head_end - slice.begin;
    if (thread < head) return slice.begin + thread;
    const std::int32_t tail = slice.tail_begin + thread - head;
    return tail < slice.end ? tail : -1;
  }

  __device__ Statistics statistics() const {
    Statistics s = no_statistics(), odd = no_statistics();
    for (std::int32_t v = threadIdx.x; v < slice.vectors; v += UNROLL * THREADS) {
      Vec vec[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (v + u * THREADS < slice.vectors) vec[u].raw = *vector_at(v + u * THREADS);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        const std::int32_t here = v + u * THREADS;
        if (here >= slice.vectors) break;
        if (here < a.cached_vectors) cache[here] = vec[u].raw;
        const std::int32_t first = slice.head_end + here * Vec::WIDTH;
        float x[Vec::WIDTH];
#pragma unroll
        for (int i = 0; i < Vec::WIDTH; ++i) x[i] = logit(vec[u].at[i]);
        add<TERMS == Terms::NONE>(s, x, first);
      }
    }
    const std::int32_t entry = unaligned_entry();
    if (entry >= 0) {
      const float x[1] = {logit(row[entry])};
      add<TERMS == Terms::NONE>(odd, x, entry);
    }
    return merge(s, odd);
  }

  // Each thread reads only the shared memory that it wrote itself, so no synchronisation is needed.
  __device__ void write_gradient(const RowResult<float>& result, std::int64_t target) const {
    for (std::int32_t v = threadIdx.x; v < slice.vectors; v += THREADS) {
      Vec vec;
      vec.raw = v < a.cached_vectors ? cache[v] : *vector_at(v);
      const std::int32_t first = slice.head_end + v * Vec::WIDTH;
#pragma unroll
      for (int i = 0; i < Vec::WIDTH; ++i) {
        const float dz = gradient<TERMS>(logit(vec.at[i]), result, inverse_softcap);
        round_to(&vec.at[i], first + i == target ? result.target_gradient : dz);
      }
      *vector_at(v) = vec.raw;
    }
    const std::int32_t entry = unaligned_entry();
    if (entry >= 0) {
      const float dz = gradient<TERMS>(logit(row[entry]), result, inverse_softcap);
      round_to(row + entry, entry == target ? result.target_gradient : dz);
    }
  }

  __device__ void write_zeros() const {
    for (std::int32_t v = threadIdx.x; v < slice.vectors; v += THREADS) *vector_at(v) = make_uint4(0, 0, 0, 0);
    const std::int32_t entry = unaligned_entry();
    if (entry >= 0) round_to(row + entry, 0.0f);
  }
};

// ---- the kernel

template <typename scalar_t, int BLOCKS_PER_ROW, Terms TERMS>
__global__ void __launch_bounds__(THREADS, 2) softmax_gradient_kernel(const Arguments a) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if constexpr (BLOCKS_PER_ROW > 1) {
    __trap();  // the launcher never selects this
    return;
  }
#endif
  extern __shared__ uint4 cache[];
  __shared__ Statistics warp_statistics[WARPS];
  __shared__ Statistics block_statistics;
  const std::int64_t i_row = blockIdx.x / BLOCKS_PER_ROW;
  const int part = static_cast<int>(blockIdx.x % BLOCKS_PER_ROW);  // the rank of this block in the cluster
  const std::int64_t position = a.positions[i_row];
  const std::int64_t target = a.targets[position];
  const float weight = a.weights == nullptr ? 1.0f : a.weights[position];
  const bool supervised = target != a.ignore_index && weight != 0.0f;
  const bool writes_results = part == 0 && threadIdx.x == 0;

  scalar_t* row = static_cast<scalar_t*>(a.logits) + i_row * a.row_stride;
  const SliceWalker<scalar_t, TERMS> walker{
      row, cache, a,
      slice_of(reinterpret_cast<std::uint64_t>(row), a.vocabulary, sizeof(scalar_t), part, BLOCKS_PER_ROW),
      TERMS == Terms::SOFTCAP ? 1.0f / a.options.softcap : 0.0f};
  if (!supervised) {  // the same for every block of the cluster
    if (a.need_gradient) walker.write_zeros();
    if (writes_results) {
      a.nll[position] = 0;
      a.correct[position] = 0;
      if (a.loss != nullptr) a.loss[position] = 0;
    }
    return;
  }

  // The target is read before any block of the row writes.
  const bool known = target >= 0 && target < a.vocabulary;
  const float target_logit = known ? walker.logit(row[target]) : NAN;
  const Statistics mine = warp_total(walker.statistics());
  if (threadIdx.x % 32 == 0) warp_statistics[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x < 32) {
    const Statistics all = warp_total(threadIdx.x < WARPS ? warp_statistics[threadIdx.x] : no_statistics());
    if (threadIdx.x == 0) block_statistics = all;
  }
  Statistics row_statistics = no_statistics();
  if constexpr (BLOCKS_PER_ROW == 1) {
    __syncthreads();
    row_statistics = block_statistics;
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    namespace cg = cooperative_groups;
    cg::this_cluster().sync();
    for (int block = 0; block < BLOCKS_PER_ROW; ++block)  // the same order in every block, so the same result
      row_statistics = merge(row_statistics, *cg::this_cluster().map_shared_rank(&block_statistics, block));
    cg::this_cluster().barrier_arrive();  // waited for at the end: a block must not exit before the others have read
#endif
  }

  const RowResult<float> result = finish<TERMS == Terms::NONE>(row_statistics.max, row_statistics.sum,
                                                              row_statistics.total, target_logit, weight,
                                                              a.vocabulary, a.options);
  if (writes_results) {
    a.nll[position] = result.nll;
    a.correct[position] = row_statistics.argmax == target;
    if (a.loss != nullptr) a.loss[position] = result.loss;
  }
  if (a.need_gradient) walker.write_gradient(result, target);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (BLOCKS_PER_ROW > 1) cooperative_groups::this_cluster().barrier_wait();
#endif
}

// ---- the launcher

struct Device {
  int max_shared_bytes;     // per block
  int shared_bytes_per_sm;
  bool clusters;
};

template <typename scalar_t>
cudaError_t query_device(Device& device) {
  int index = 0, major = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&device.shared_bytes_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  // A newer device runs the PTX for sm_80, which has no clusters.
  cudaFuncAttributes compiled{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, softmax_gradient_kernel<scalar_t, 2, Terms::NONE>);
  device.clusters = major >= 9 && compiled.ptxVersion >= 90;
  return error;
}

template <typename scalar_t, int BLOCKS_PER_ROW, Terms TERMS>
cudaError_t launch(Arguments a, std::int64_t rows, const Device& device, cudaStream_t stream) {
  auto* kernel = softmax_gradient_kernel<scalar_t, BLOCKS_PER_ROW, TERMS>;
  constexpr int STATIC_BYTES = (WARPS + 1) * sizeof(Statistics);
  const std::int64_t slice_entries = slice_size(a.vocabulary, sizeof(scalar_t), BLOCKS_PER_ROW);
  const std::int64_t slice_bytes = (slice_entries * std::int64_t{sizeof(scalar_t)} + 15) / 16 * 16;
  const std::int64_t max_bytes = (device.max_shared_bytes - STATIC_BYTES) / 16 * 16;
  const int bytes = static_cast<int>(!a.need_gradient ? 0 : slice_bytes < max_bytes ? slice_bytes : max_bytes);
  a.cached_vectors = bytes / 16;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = BLOCKS_PER_ROW;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * BLOCKS_PER_ROW));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = BLOCKS_PER_ROW > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

// The fewest blocks per row such that two blocks fit on a multiprocessor, so that one reads while the other writes.
template <typename scalar_t>
int blocks_per_row(std::int64_t vocabulary, const Device& device) {
  constexpr int RESERVED_BYTES = 2048;  // per block: 1 KiB for the system, the rest for static variables
  const int half = device.shared_bytes_per_sm / 2 - RESERVED_BYTES;
  int blocks = 1;
  while (device.clusters && blocks < MAX_BLOCKS_PER_ROW &&
         slice_size(vocabulary, sizeof(scalar_t), blocks) * std::int64_t{sizeof(scalar_t)} > half)
    blocks *= 2;
  return blocks;
}

template <typename scalar_t, Terms TERMS>
cudaError_t run(const Arguments& a, std::int64_t rows, cudaStream_t stream) {
  Device device{};
  const cudaError_t error = query_device<scalar_t>(device);
  if (error != cudaSuccess) return error;
  switch (blocks_per_row<scalar_t>(a.vocabulary, device)) {
    case 1:
      return launch<scalar_t, 1, TERMS>(a, rows, device, stream);
    case 2:
      return launch<scalar_t, 2, TERMS>(a, rows, device, stream);
    default:
      return launch<scalar_t, 4, TERMS>(a, rows, device, stream);
  }
}

template <typename scalar_t>
cudaError_t run(const Arguments& a, std::int64_t rows, cudaStream_t stream) {
  const RowOptions<float>& o = a.options;
  if (o.softcap != 0) return run<scalar_t, Terms::SOFTCAP>(a, rows, stream);
  if (o.z_loss != 0 || o.smoothing != 0) return run<scalar_t, Terms::LOSS>(a, rows, stream);
  return run<scalar_t, Terms::NONE>(a, rows, stream);
}

}  // namespace
}  // namespace delib_fast

extern "C" {

// dtype: 0 float32, 1 bfloat16, 2 float16. All pointers are device pointers; `weights` and `loss` may be null.
// Rows of logits are `row_stride` elements apart. Returns a cudaError_t and does not synchronise.
int delib_fast_softmax_gradient(void* logits, int dtype, std::int64_t rows, std::int64_t vocabulary,
                                std::int64_t row_stride, const std::int64_t* positions, const std::int64_t* targets,
                                const float* weights, float* nll, float* loss, std::uint8_t* correct,
                                std::int64_t ignore_index, float softcap, float z_loss, float smoothing,
                                int need_gradient, void* stream) {
  using namespace delib_fast;
  constexpr std::int64_t MAX_ENTRIES = (std::int64_t{1} << 31) - 64;
  if (rows == 0) return cudaSuccess;
  if (rows < 0 || rows > MAX_ENTRIES / MAX_BLOCKS_PER_ROW) return cudaErrorInvalidValue;
  if (vocabulary < 1 || vocabulary > MAX_ENTRIES || row_stride < vocabulary) return cudaErrorInvalidValue;
  const RowOptions<float> options{softcap, z_loss, smoothing};
  const Arguments a{logits, positions, targets, weights, nll, loss, correct, vocabulary, row_stride,
                    ignore_index, options, 0, need_gradient != 0};
  auto* cuda_stream = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case 0:
      return run<float>(a, rows, cuda_stream);
    case 1:
      return run<__nv_bfloat16>(a, rows, cuda_stream);
    case 2:
      return run<__half>(a, rows, cuda_stream);
    default:
      return cudaErrorInvalidValue;
  }
}

// The description of a cudaError_t.
const char* delib_fast_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
