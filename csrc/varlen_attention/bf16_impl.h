// Flash attention (arXiv 2307.08691) of one sequence under one kv head in bfloat16, with float32 sums, for processors
// that multiply bfloat16. bf16_kernels.cpp includes this file once per instruction set.
//
// A block of scores is stored as its transpose S^T, keys by queries. The softmax of 16 queries then runs along one
// vector, without sums across its entries, and every product has a first operand by rows and a second one in pairs of
// rows, which come without a transpose from the registers that computed the probabilities:
//
//   forward    S^T = K . Q^T          O^T += V^T . P^T
//   backward   S^T = K . Q^T          dP^T = V . dO^T          dV += P^T . dO          dK += dS^T . Q
//              dQ^T += K^T . dS^T
//
// K, V and their transposes are copied once per task, and shared by the query heads of the group. As on GPUs, P and dS
// are rounded to bfloat16 before the products. Sinks, window and softcap are as in kernels_impl.h.
#include <math.h>

#include <cstdint>

#include "varlen_attention/bf16_products.h"
#include "varlen_attention/kernels.h"
#include "varlen_attention/vector_math.h"

namespace delib_fast::attention::SIMD_TARGET {
namespace {

constexpr std::int64_t BLOCK = BF16_BLOCK;
constexpr int COLUMNS = BLOCK / WIDTH;  // vectors of a row of a block

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

// 2**x for x <= 0 with a relative error of 3e-6, far below that of bfloat16. The result is exactly 1 for 0, 0 below the
// normal range and for -inf, and NaN for NaN.
inline Vector exp2_of(Vector x) {
  const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vector r = x - n;
  Vector p = splat(1.33335581e-3f);  // ln(2)**k / k!
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 0.240226507f;
  p = p * r + 0.693147181f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(is_normal, p, n);  // a subnormal result would take a hundred cycles
}

inline Vector& vector_at(float* p) { return *reinterpret_cast<Vector*>(p); }

// Hands out the parts of a task's scratch memory, each aligned to 64 bytes.
struct Scratch {
  float* next;
  template <typename T>
  T* take(std::int64_t count) {
    T* part = reinterpret_cast<T*>(next);
    next += round_up((count * static_cast<std::int64_t>(sizeof(T)) + 3) / 4, 16);
    return part;
  }
};

// A block of queries [begin, begin + count) of one head, and the keys that it visits.
struct Queries {
  std::int64_t begin, count, columns;  // columns: count, rounded up to a multiple of 32
  std::int64_t start, end;             // the first block of keys, and the end of the keys

  Queries(std::int64_t first, const Problem& task)
      : begin(first),
        count(smaller(BLOCK, task.length - first)),
        columns(round_up(count, 32)),
        start(first < task.window ? 0 : (first - task.window + 1) / BLOCK * BLOCK),
        end(first + count) {}

  std::int64_t rows(std::int64_t first_key) const { return round_up(smaller(BLOCK, end - first_key), 32); }

  // Whether some query does not attend to some key of the block.
  bool is_masked(std::int64_t first_key, const Problem& task) const {
    return first_key + rows(first_key) - 1 > begin || first_key <= begin + columns - 1 - task.window;
  }
};

// For each of 16 queries from `first_query` on, whether it attends to the key: all ones or zero.
struct Mask {
  Integers queries, oldest;

  Mask(std::int64_t first_query, const Problem& task) {
    for (int i = 0; i < WIDTH; ++i) queries[i] = static_cast<std::int32_t>(first_query + i);
    oldest = queries - static_cast<std::int32_t>(smaller(task.window, task.length) - 1);
  }
  Integers visible(std::int64_t key) const {
    const Integers k = Integers{} + static_cast<std::int32_t>(key);
    return (k <= queries) & (k >= oldest);
  }
};

template <typename T>
inline const T* row(const Heads<const T>& from, std::int64_t token, std::int64_t head) {
  return from.data + token * from.token_stride + head * from.head_stride;
}
template <typename T>
inline T* row(const Heads<T>& to, std::int64_t token, std::int64_t head) {
  return to.data + token * to.token_stride + head * to.head_stride;
}

// to[d][t] = from[t][d], for `padded` tokens. `pairs` is scratch.
inline void transposed_copy(const Heads<const bf16_bits>& from, std::int64_t length, std::int64_t padded,
                            std::int64_t dim, word* pairs, bf16_bits* to) {
  pair_rows(from.data, from.token_stride, length, padded, dim, pairs);
  transpose_words(pairs, 4 * dim, padded / 2, padded / 2, dim, reinterpret_cast<word*>(to), padded / 2);
}

// One step of the online softmax of 16 queries: writes the probabilities of a column of scores in pairs of rows, and
// updates `max`, which is in units of log2, and `sum`. Returns the factor that rescales the earlier sums.
template <bool MASKED>
inline Vector update_softmax(float* scores, std::int64_t rows, std::int64_t first_key, const Mask& mask,
                             const Problem& task, Vector& max, Vector& sum, word* pairs) {
  Vector new_max = max;
  for (std::int64_t r = 0; r < rows; ++r) {
    Vector s = vector_at(scores + r * BLOCK);
    s = task.softcap > 0.0f ? tanh_of(s * (task.scale / task.softcap)) * (task.softcap * LOG2_E)
                            : s * (task.scale * LOG2_E);
    if (MASKED) s = mask.visible(first_key + r) ? s : splat(-INFINITY);
    vector_at(scores + r * BLOCK) = s;
    new_max = larger(s, new_max);
  }
  const Vector shift = new_max == splat(-INFINITY) ? Vector{} : new_max;
  Vector total{};
  for (std::int64_t r = 0; r < rows; r += 2) {
    const Vector low = exp2_of(vector_at(scores + r * BLOCK) - shift);
    const Vector high = exp2_of(vector_at(scores + (r + 1) * BLOCK) - shift);
    total += low + high;
    _mm512_storeu_si512(pairs + r / 2 * BLOCK, paired(low, high));
  }
  const Vector rescale = exp2_of(max - shift);
  sum = sum * rescale + total;
  max = new_max;
  return rescale;
}

struct ForwardScratch {
  bf16_bits *k, *v_t;
  word *q, *pairs;
  float *out, *scores;

  ForwardScratch(const Forward<bf16_bits>& task, float* memory) {
    const std::int64_t padded = round_up(task.length, BLOCK), depth = round_up(task.dim, 32);
    Scratch scratch{memory};
    k = scratch.take<bf16_bits>(padded * depth);
    v_t = scratch.take<bf16_bits>(padded * task.value_dim);
    q = scratch.take<word>(depth / 2 * BLOCK);
    out = scratch.take<float>(task.value_dim * BLOCK);
    scores = scratch.take<float>(BLOCK * BLOCK);
    pairs = scratch.take<word>(padded / 2 * task.value_dim + BLOCK / 2 * BLOCK);
    copy_rows(task.k.data, task.k.token_stride, task.length, padded, task.dim, depth, k);
    transposed_copy(task.v, task.length, padded, task.value_dim, pairs, v_t);
  }
};

inline void forward_block(const Forward<bf16_bits>& task, std::int64_t head, const Queries& block,
                          const ForwardScratch& at) {
  const std::int64_t depth = round_up(task.dim, 32), padded = round_up(task.length, BLOCK), V = task.value_dim;
  const float sink = task.sinks == nullptr ? -INFINITY : task.sinks[head];  // a sink of -inf has no effect
  Vector max[COLUMNS], sum[COLUMNS];
  for (int c = 0; c < COLUMNS; ++c) max[c] = splat(sink * LOG2_E), sum[c] = splat(sink == -INFINITY ? 0.0f : 1.0f);
  transpose_words(row(task.q, block.begin, head), 2 * task.q.token_stride, block.count, block.columns, task.dim / 2,
                  at.q, BLOCK);
  for (std::int64_t first = block.start; first < block.end; first += BLOCK) {
    const std::int64_t rows = block.rows(first);
    const bool masked = block.is_masked(first, task);
    product(rows, block.columns, depth, at.k + first * depth, depth, at.q, BLOCK, at.scores, BLOCK, false);
    for (std::int64_t c = 0; c < block.columns; c += WIDTH) {
      const Mask mask(block.begin + c, task);
      const auto update = masked ? update_softmax<true> : update_softmax<false>;
      const Vector rescale =
          update(at.scores + c, rows, first, mask, task, max[c / WIDTH], sum[c / WIDTH], at.pairs + c);
      for (std::int64_t d = 0; first > block.start && d < V; ++d) vector_at(at.out + d * BLOCK + c) *= rescale;
    }
    product(V, block.columns, rows, at.v_t + first, padded, at.pairs, BLOCK, at.out, BLOCK, first > block.start);
  }
  for (std::int64_t c = 0; c < block.columns; c += WIDTH) {
    for (std::int64_t d = 0; d < V; ++d) vector_at(at.out + d * BLOCK + c) /= sum[c / WIDTH];
    for (std::int64_t i = c; i < smaller(c + WIDTH, block.count); ++i)
      *row(task.lse, block.begin + i, head) = max[c / WIDTH][i - c] * LN_2 + logf(sum[c / WIDTH][i - c]);
  }
  scatter_transposed(at.out, BLOCK, block.count, V, row(task.out, block.begin, head), task.out.token_stride);
}

void forward_bf16(const Forward<bf16_bits>& task, float* memory) {
  const TileRegisters registers;
  const ForwardScratch scratch(task, memory);
  for (std::int64_t head = 0; head < task.group; ++head)
    for (std::int64_t begin = 0; begin < task.length; begin += BLOCK)
      forward_block(task, head, Queries(begin, task), scratch);
}

struct BackwardScratch {
  bf16_bits *k, *k_t, *v, *p, *ds;
  word *q, *d_out, *q_pairs, *d_out_pairs, *pairs;
  float *dk, *dv, *dq, *scores, *d_scores;

  BackwardScratch(const Backward<bf16_bits>& task, float* memory) {
    const std::int64_t D = task.dim, V = task.value_dim, padded = round_up(task.length, BLOCK);
    const std::int64_t depth = round_up(D, 32), value_depth = round_up(V, 32);
    Scratch scratch{memory};
    k = scratch.take<bf16_bits>(padded * depth);
    k_t = scratch.take<bf16_bits>(padded * D);
    v = scratch.take<bf16_bits>(padded * value_depth);
    dk = scratch.take<float>(padded * D);
    dv = scratch.take<float>(padded * V);
    q = scratch.take<word>(depth / 2 * BLOCK);
    d_out = scratch.take<word>(value_depth / 2 * BLOCK);
    q_pairs = scratch.take<word>(BLOCK / 2 * D);
    d_out_pairs = scratch.take<word>(BLOCK / 2 * V);
    dq = scratch.take<float>(D * BLOCK);
    scores = scratch.take<float>(BLOCK * BLOCK);
    d_scores = scratch.take<float>(BLOCK * BLOCK);
    p = scratch.take<bf16_bits>(BLOCK * BLOCK);
    ds = scratch.take<bf16_bits>(BLOCK * BLOCK);
    pairs = scratch.take<word>(padded / 2 * D + BLOCK / 2 * BLOCK);
    copy_rows(task.k.data, task.k.token_stride, task.length, padded, D, depth, k);
    copy_rows(task.v.data, task.v.token_stride, task.length, padded, V, value_depth, v);
    transposed_copy(task.k, task.length, padded, D, pairs, k_t);
    for (std::int64_t i = 0; i < padded * D; i += WIDTH) vector_at(dk + i) = Vector{};
    for (std::int64_t i = 0; i < padded * V; i += WIDTH) vector_at(dv + i) = Vector{};
  }
};

// Turns scores and d_probabilities of 16 queries into probabilities and d_scores, both 0 for keys that are not visible,
// and rounds them: by rows in `p` and `ds`, and d_scores also in pairs of rows. The scores come in before the cap; lse
// is in units of log2.
template <bool MASKED>
inline void softmax_backward(const BackwardScratch& at, std::int64_t c, std::int64_t rows, std::int64_t first_key,
                             const Mask& mask, const Problem& task, Vector lse, Vector delta) {
  for (std::int64_t r = 0; r < rows; r += 2) {
    Vector ds[2];
    for (int i = 0; i < 2; ++i) {
      const std::int64_t entry = (r + i) * BLOCK + c;
      Vector s = vector_at(at.scores + entry);
      ds[i] = vector_at(at.d_scores + entry) - delta;
      if (task.softcap > 0.0f) {
        const Vector t = tanh_of(s * (task.scale / task.softcap));
        s = t * (task.softcap * LOG2_E);
        ds[i] *= 1.0f - t * t;
      } else {
        s *= task.scale * LOG2_E;
      }
      Vector p = exp2_of(s - lse);
      ds[i] *= p;
      if (MASKED) {
        const Integers visible = mask.visible(first_key + r + i);
        p = visible ? p : Vector{};
        ds[i] = visible ? ds[i] : Vector{};
      }
      store_rounded(at.p + entry, p);
      store_rounded(at.ds + entry, ds[i]);
    }
    _mm512_storeu_si512(at.pairs + r / 2 * BLOCK + c, paired(ds[0], ds[1]));
  }
}

// lse in units of log2, and delta = sum of out . d_out, of a block. Past its end, lse is infinite, so that these
// probabilities are 0.
inline void row_statistics(const Backward<bf16_bits>& task, std::int64_t head, const Queries& block, float* lse,
                           float* delta) {
  for (std::int64_t i = 0; i < block.columns; ++i) {
    lse[i] = INFINITY, delta[i] = 0.0f;
    if (i >= block.count) continue;
    lse[i] = *row(task.lse, block.begin + i, head) * LOG2_E;
    const bf16_bits* out = row(task.out, block.begin + i, head);
    const bf16_bits* d_out = row(task.d_out, block.begin + i, head);
    __m512 total = _mm512_setzero_ps();
    for (std::int64_t d = 0; d < task.value_dim; d += 16)
      total = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(widened(out + d), 16),
                              (__m512)_mm512_slli_epi32(widened(d_out + d), 16), total);
    delta[i] = _mm512_reduce_add_ps(total);
  }
}

inline void backward_block(const Backward<bf16_bits>& task, std::int64_t head, const Queries& block,
                           const BackwardScratch& at) {
  const std::int64_t D = task.dim, V = task.value_dim, padded = round_up(task.length, BLOCK);
  const std::int64_t depth = round_up(D, 32), value_depth = round_up(V, 32), columns = block.columns;
  const bf16_bits* q = row(task.q, block.begin, head);
  const bf16_bits* d_out = row(task.d_out, block.begin, head);
  alignas(64) float lse[BLOCK], delta[BLOCK];
  row_statistics(task, head, block, lse, delta);
  transpose_words(q, 2 * task.q.token_stride, block.count, columns, D / 2, at.q, BLOCK);
  transpose_words(d_out, 2 * task.d_out.token_stride, block.count, columns, V / 2, at.d_out, BLOCK);
  pair_rows(q, task.q.token_stride, block.count, columns, D, at.q_pairs);
  pair_rows(d_out, task.d_out.token_stride, block.count, columns, V, at.d_out_pairs);
  for (std::int64_t first = block.start; first < block.end; first += BLOCK) {
    const std::int64_t rows = block.rows(first);
    const auto to_d_scores = block.is_masked(first, task) ? softmax_backward<true> : softmax_backward<false>;
    product(rows, columns, depth, at.k + first * depth, depth, at.q, BLOCK, at.scores, BLOCK, false);
    product(rows, columns, value_depth, at.v + first * value_depth, value_depth, at.d_out, BLOCK, at.d_scores, BLOCK,
            false);
    for (std::int64_t c = 0; c < columns; c += WIDTH)
      to_d_scores(at, c, rows, first, Mask(block.begin + c, task), task, vector_at(lse + c), vector_at(delta + c));
    product(rows, V, columns, at.p, BLOCK, at.d_out_pairs, V, at.dv + first * V, V, true);
    product(rows, D, columns, at.ds, BLOCK, at.q_pairs, D, at.dk + first * D, D, true);
    product(D, columns, rows, at.k_t + first, padded, at.pairs, BLOCK, at.dq, BLOCK, first > block.start);
  }
  for (std::int64_t i = 0; i < D * BLOCK; i += WIDTH) vector_at(at.dq + i) *= task.scale;
  scatter_transposed(at.dq, BLOCK, block.count, D, row(task.dq, block.begin, head), task.dq.token_stride);
}

inline void scatter_rounded(const float* from, std::int64_t count, std::int64_t dim, float factor,
                            const Heads<bf16_bits>& to) {
  for (std::int64_t t = 0; t < count; ++t, from += dim)
    for (std::int64_t d = 0; d < dim; d += WIDTH)
      store_rounded(row(to, t, 0) + d, _mm512_mul_ps(_mm512_loadu_ps(from + d), _mm512_set1_ps(factor)));
}

void backward_bf16(const Backward<bf16_bits>& task, float* memory) {
  const TileRegisters registers;
  const BackwardScratch scratch(task, memory);
  for (std::int64_t head = 0; head < task.group; ++head)
    for (std::int64_t begin = 0; begin < task.length; begin += BLOCK)
      backward_block(task, head, Queries(begin, task), scratch);
  scatter_rounded(scratch.dk, task.length, task.dim, task.scale, task.dk);
  scatter_rounded(scratch.dv, task.length, task.value_dim, 1.0f, task.dv);
}

const Bf16Kernels BF16_KERNELS = {SIMD_NAME, &forward_bf16, &backward_bf16};

}  // namespace
}  // namespace delib_fast::attention::SIMD_TARGET
