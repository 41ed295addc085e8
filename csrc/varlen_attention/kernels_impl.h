// Flash attention (arXiv 2307.08691) of one sequence under one kv head, computed in float32 for every input dtype.
// for_each_simd_target.h includes this file once per instruction set.
//
// A task first copies k and v into the layouts that the matrix products need: K^T and V^T in blocks of KEYS columns, K
// and V by rows. Each block of QUERIES then iterates over the blocks of keys that are visible to it. Every product has
// the form C (+)= A . B with the rows of B along vectors, so one small routine computes all seven. Memory traffic:
// q, k, v (and out, d_out) are read once, the results are written once, and everything else stays in `scratch`.
//
// A sink is one more key whose value is zero: the online softmax starts from its score, and neither the outputs nor the
// backward pass change otherwise, because out and lse contain it.
#include <math.h>

#include <cstdint>

#include "varlen_attention/kernels.h"
#include "varlen_attention/vector_math.h"

namespace delib_fast::attention::SIMD_TARGET {
namespace {

constexpr int TILE_ROWS = SIMD_FLOATS == 16 ? 8 : 4;  // the sums of a tile and one row of B fit the vector registers

inline void cap(float* scores, std::int64_t columns, float softcap) {
  for (std::int64_t j = 0; j < columns; j += WIDTH) {
    auto& s = *reinterpret_cast<Vector*>(scores + j);
    s = tanh_of(s / softcap) * softcap;
  }
}

// C (TILE_ROWS, COLUMNS * WIDTH) (+)= A (TILE_ROWS, depth) . B. Element (i, k) of A is a[i * by_row + k * by_depth].
template <int COLUMNS>
inline void tile(std::int64_t depth, const float* a, std::int64_t by_row, std::int64_t by_depth, const float* b,
                 std::int64_t b_stride, float* c, std::int64_t c_stride, bool add) {
  Vector sum[TILE_ROWS][COLUMNS];
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j)
      sum[i][j] = add ? *reinterpret_cast<const Vector*>(c + i * c_stride + j * WIDTH) : Vector{};
  for (std::int64_t k = 0; k < depth; ++k) {
    Vector row[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) row[j] = *reinterpret_cast<const Vector*>(b + k * b_stride + j * WIDTH);
    for (int i = 0; i < TILE_ROWS; ++i) {
      const Vector factor = splat(a[i * by_row + k * by_depth]);
      for (int j = 0; j < COLUMNS; ++j) sum[i][j] += factor * row[j];
    }
  }
  for (int i = 0; i < TILE_ROWS; ++i)
    for (int j = 0; j < COLUMNS; ++j) *reinterpret_cast<Vector*>(c + i * c_stride + j * WIDTH) = sum[i][j];
}

// C (rows, columns) (+)= A . B. `rows` must be a multiple of TILE_ROWS, `columns` a multiple of 16.
void product(std::int64_t rows, std::int64_t columns, std::int64_t depth, const float* a, std::int64_t by_row,
             std::int64_t by_depth, const float* b, std::int64_t b_stride, float* c, std::int64_t c_stride, bool add) {
  for (std::int64_t j = 0; j < columns;) {
    const bool wide = columns - j >= 2 * WIDTH;
    for (std::int64_t i = 0; i < rows; i += TILE_ROWS) {
      if (wide) {
        tile<2>(depth, a + i * by_row, by_row, by_depth, b + j, b_stride, c + i * c_stride + j, c_stride, add);
      } else {
        tile<1>(depth, a + i * by_row, by_row, by_depth, b + j, b_stride, c + i * c_stride + j, c_stride, add);
      }
    }
    j += wide ? 2 * WIDTH : WIDTH;
  }
}

// Copies rows [begin, begin + count) of one head as float32, times `factor`, and appends zeros until there are `total`
// rows.
template <typename scalar_t>
void gather(const Heads<const scalar_t>& from, std::int64_t head, std::int64_t begin, std::int64_t count,
            std::int64_t total, std::int64_t dim, float factor, float* to) {
  for (std::int64_t t = 0; t < total; ++t) {
    const scalar_t* row = from.data + (begin + t) * from.token_stride + head * from.head_stride;
    for (std::int64_t d = 0; d < dim; ++d) to[t * dim + d] = t < count ? load(row + d) * factor : 0.0f;
  }
}

// Transposes (length, dim) into blocks of (dim, KEYS), with zeros after the end.
template <typename scalar_t>
void gather_transposed(const Heads<const scalar_t>& from, std::int64_t length, std::int64_t dim, float* to) {
  for (std::int64_t first = 0; first < length; first += KEYS, to += dim * KEYS) {
    for (std::int64_t t = 0; t < KEYS; ++t) {
      const scalar_t* row = from.data + (first + t) * from.token_stride;
      for (std::int64_t d = 0; d < dim; ++d) to[d * KEYS + t] = first + t < length ? load(row + d) : 0.0f;
    }
  }
}

template <typename scalar_t>
void scatter(const float* from, std::int64_t begin, std::int64_t count, std::int64_t dim, std::int64_t head,
             float factor, const Heads<scalar_t>& to) {
  for (std::int64_t t = 0; t < count; ++t) {
    scalar_t* row = to.data + (begin + t) * to.token_stride + head * to.head_stride;
    for (std::int64_t d = 0; d < dim; ++d) store(row + d, from[t * dim + d] * factor);
  }
}

// The keys of one block that a query attends to, as columns [begin, end).
struct Visible {
  std::int64_t begin, end;
};

inline Visible visible_keys(std::int64_t query, std::int64_t first_key, std::int64_t columns, std::int64_t window) {
  const std::int64_t begin = query - window + 1 - first_key, end = query + 1 - first_key;
  return {begin < 0 ? 0 : smaller(begin, columns), end < 0 ? 0 : smaller(end, columns)};
}

// The first block of keys that the queries from `begin` on attend to.
inline std::int64_t first_block(std::int64_t begin, std::int64_t window) {
  return begin < window ? 0 : (begin - window + 1) / KEYS * KEYS;
}

// One step of the online softmax, for one row of scores. Masks the keys that are not visible, updates `max` and `sum`,
// and replaces each score with e^(score - max). Returns the factor that rescales the earlier sums.
inline float update_softmax(float* scores, std::int64_t columns, Visible visible, float& max, float& sum) {
  for (std::int64_t j = 0; j < visible.begin; ++j) scores[j] = -INFINITY;
  for (std::int64_t j = visible.end; j < columns; ++j) scores[j] = -INFINITY;
  Vector block_max = splat(-INFINITY);
  for (std::int64_t j = 0; j < columns; j += WIDTH)
    block_max = larger(*reinterpret_cast<Vector*>(scores + j), block_max);
  float new_max = max;
  for (int i = 0; i < WIDTH; ++i) new_max = block_max[i] > new_max ? block_max[i] : new_max;
  const float shift = new_max == -INFINITY ? 0.0f : new_max;
  Vector total{};
  for (std::int64_t j = 0; j < columns; j += WIDTH) {
    auto& at = *reinterpret_cast<Vector*>(scores + j);
    at = exp_of(at - shift);
    total += at;
  }
  const float rescale = exp_one(max - shift);
  sum *= rescale;
  for (int i = 0; i < WIDTH; ++i) sum += total[i];
  max = new_max;
  return rescale;
}

template <typename scalar_t>
void forward(const Forward<scalar_t>& task, float* scratch) {
  const std::int64_t L = task.length, D = task.dim, V = task.value_dim;
  float* k_t = scratch;
  float* v = k_t + padded(L) * D;
  float* q = v + padded(L) * V;
  float* out = q + QUERIES * D;
  float* scores = out + QUERIES * V;
  gather_transposed(task.k, L, D, k_t);
  gather(task.v, 0, 0, L, padded(L), V, 1.0f, v);
  for (std::int64_t head = 0; head < task.group; ++head) {
    for (std::int64_t begin = 0; begin < L; begin += QUERIES) {
      const std::int64_t count = smaller(QUERIES, L - begin), end = begin + count;
      const std::int64_t start = first_block(begin, task.window);
      // A sink of -inf has no effect.
      const float sink = task.sinks == nullptr ? -INFINITY : task.sinks[head];
      float max[QUERIES], sum[QUERIES];
      for (std::int64_t i = 0; i < QUERIES; ++i) max[i] = sink, sum[i] = sink == -INFINITY ? 0.0f : 1.0f;
      gather(task.q, head, begin, count, QUERIES, D, task.scale, q);
      for (std::int64_t first = start; first < end; first += KEYS) {
        const std::int64_t columns = round_up(smaller(KEYS, end - first), D_MULTIPLE);
        product(QUERIES, columns, D, q, D, 1, k_t + first * D, KEYS, scores, KEYS, false);
        for (std::int64_t i = 0; i < QUERIES; ++i) {
          if (task.softcap > 0.0f) cap(scores + i * KEYS, columns, task.softcap);
          const Visible visible = visible_keys(begin + smaller(i, count - 1), first, columns, task.window);
          const float rescale = update_softmax(scores + i * KEYS, columns, visible, max[i], sum[i]);
          if (first > start && rescale != 1.0f)
            for (std::int64_t d = 0; d < V; ++d) out[i * V + d] *= rescale;
        }
        product(QUERIES, V, columns, scores, KEYS, 1, v + first * V, V, out, V, first > start);
      }
      for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t d = 0; d < V; ++d) out[i * V + d] /= sum[i];
        task.lse.data[(begin + i) * task.lse.token_stride + head * task.lse.head_stride] = max[i] + logf(sum[i]);
      }
      scatter(out, begin, count, V, head, 1.0f, task.out);
    }
  }
}

// Turns scores into probabilities and d_probabilities into d_scores, both in place. Both are 0 for keys that are not
// visible. The scores come in before the cap.
inline void softmax_backward(float* scores, float* d_scores, std::int64_t columns, Visible visible, float lse,
                             float delta, float softcap) {
  for (std::int64_t j = 0; j < columns; j += WIDTH) {
    auto& p = *reinterpret_cast<Vector*>(scores + j);
    auto& dp = *reinterpret_cast<Vector*>(d_scores + j);
    if (softcap > 0.0f) {
      const Vector t = tanh_of(p / softcap);
      p = exp_of(t * softcap - lse);
      dp = p * (dp - delta) * (1.0f - t * t);
    } else {
      p = exp_of(p - lse);
      dp = p * (dp - delta);
    }
  }
  for (std::int64_t j = 0; j < visible.begin; ++j) scores[j] = d_scores[j] = 0.0f;
  for (std::int64_t j = visible.end; j < columns; ++j) scores[j] = d_scores[j] = 0.0f;
}

template <typename scalar_t>
void backward(const Backward<scalar_t>& task, float* scratch) {
  const std::int64_t L = task.length, D = task.dim, V = task.value_dim;
  float* k_t = scratch;
  float* v_t = k_t + padded(L) * D;
  float* k = v_t + padded(L) * V;
  float* dk = k + padded(L) * D;
  float* dv = dk + padded(L) * D;
  float* q = dv + padded(L) * V;
  float* dq = q + QUERIES * D;
  float* d_out = dq + QUERIES * D;
  float* out = d_out + QUERIES * V;
  float* scores = out + QUERIES * V;
  float* d_scores = scores + QUERIES * KEYS;
  gather_transposed(task.k, L, D, k_t);
  gather_transposed(task.v, L, V, v_t);
  gather(task.k, 0, 0, L, padded(L), D, 1.0f, k);
  for (std::int64_t i = 0; i < padded(L) * (D + V); ++i) dk[i] = 0.0f;  // dv follows dk
  for (std::int64_t head = 0; head < task.group; ++head) {
    for (std::int64_t begin = 0; begin < L; begin += QUERIES) {
      const std::int64_t count = smaller(QUERIES, L - begin), end = begin + count;
      const std::int64_t start = first_block(begin, task.window);
      float lse[QUERIES], delta[QUERIES];
      gather(task.out, head, begin, count, QUERIES, V, 1.0f, out);
      gather(task.d_out, head, begin, count, QUERIES, V, 1.0f, d_out);
      gather(task.q, head, begin, count, QUERIES, D, task.scale, q);
      for (std::int64_t i = 0; i < QUERIES; ++i) {
        const std::int64_t token = begin + smaller(i, count - 1);
        lse[i] = task.lse.data[token * task.lse.token_stride + head * task.lse.head_stride];
        Vector total{};
        for (std::int64_t d = 0; d < V; d += WIDTH)
          total += *reinterpret_cast<Vector*>(out + i * V + d) * *reinterpret_cast<Vector*>(d_out + i * V + d);
        delta[i] = 0.0f;
        for (int w = 0; w < WIDTH; ++w) delta[i] += total[w];
      }
      for (std::int64_t first = start; first < end; first += KEYS) {
        const std::int64_t columns = round_up(smaller(KEYS, end - first), D_MULTIPLE);
        product(QUERIES, columns, D, q, D, 1, k_t + first * D, KEYS, scores, KEYS, false);
        product(QUERIES, columns, V, d_out, V, 1, v_t + first * V, KEYS, d_scores, KEYS, false);
        for (std::int64_t i = 0; i < QUERIES; ++i) {
          const Visible visible = i < count ? visible_keys(begin + i, first, columns, task.window) : Visible{0, 0};
          softmax_backward(scores + i * KEYS, d_scores + i * KEYS, columns, visible, lse[i], delta[i], task.softcap);
        }
        product(columns, V, QUERIES, scores, 1, KEYS, d_out, V, dv + first * V, V, true);
        product(columns, D, QUERIES, d_scores, 1, KEYS, q, D, dk + first * D, D, true);
        product(QUERIES, D, columns, d_scores, KEYS, 1, k + first * D, D, dq, D, first > start);
      }
      scatter(dq, begin, count, D, head, task.scale, task.dq);
    }
  }
  scatter(dk, 0, L, D, 0, 1.0f, task.dk);
  scatter(dv, 0, L, V, 0, 1.0f, task.dv);
}

const Kernels KERNELS = {
    SIMD_NAME, &forward<float>, &forward<bf16_bits>, &backward<float>, &backward<bf16_bits>,
};

}  // namespace
}  // namespace delib_fast::attention::SIMD_TARGET
