// Runs the arithmetic of csrc/linear_cross_entropy/row_math.h on the host in the order of softmax_gradient.cu, for one
// float32 row: parts for the blocks of a cluster, vectors distributed over threads, statistics merged in a butterfly.
#include "linear_cross_entropy/row_math.h"

#include <vector>

using namespace delib_fast;

namespace {

constexpr int WIDTH = 4;  // float32

template <Terms TERMS>
struct HostRow {
  float* row;
  RowOptions<float> options;
  int threads;
  float inverse_softcap;

  float logit(std::int32_t entry) const {
    return final_logit<TERMS>(row[entry], options, inverse_softcap);
  }
  Statistics thread_statistics(const Slice& slice, int thread) const {
    Statistics s = no_statistics(), odd = no_statistics();
    for (std::int32_t v = thread; v < slice.vectors; v += threads) {
      const std::int32_t first = slice.head_end + v * WIDTH;
      float x[WIDTH];
      for (int i = 0; i < WIDTH; ++i) x[i] = logit(first + i);
      add<TERMS == Terms::NONE>(s, x, first);
    }
    const std::int32_t head = slice.head_end - slice.begin;
    std::int32_t entry = slice.begin + thread;
    if (thread >= head) entry = slice.tail_begin + thread - head;
    if (entry < slice.end) {
      const float x[1] = {logit(entry)};
      add<TERMS == Terms::NONE>(odd, x, entry);
    }
    return merge(s, odd);
  }
  Statistics part_statistics(const Slice& slice) const {
    std::vector<Statistics> all;
    for (int thread = 0; thread < threads; ++thread) all.push_back(thread_statistics(slice, thread));
    for (std::size_t distance = all.size() / 2; distance > 0; distance /= 2) {
      std::vector<Statistics> next = all;
      for (std::size_t i = 0; i < all.size(); ++i) next[i] = merge(all[i], all[i ^ distance]);
      all = next;
    }
    return all[0];
  }
};

template <Terms TERMS>
void run(float* row, std::int64_t vocabulary, std::int64_t target, float weight, const RowOptions<float>& options, int parts, int threads, float* loss_and_nll, std::int32_t* argmax) {
  const HostRow<TERMS> host{row, options, threads, options.softcap > 0 ? 1.0f / options.softcap : 0.0f};
  Statistics all = no_statistics();
  for (int part = 0; part < parts; ++part)
    all = merge(all, host.part_statistics(slice_of(reinterpret_cast<std::uint64_t>(row), vocabulary, 4, part, parts)));
  const bool known = target >= 0 && target < vocabulary;
  const float target_logit = known ? host.logit(static_cast<std::int32_t>(target)) : NAN;
  const RowResult<float> result =
      finish<TERMS == Terms::NONE>(all.max, all.sum, all.total, target_logit, weight, vocabulary, options);
  loss_and_nll[0] = result.loss;
  loss_and_nll[1] = result.nll;
  *argmax = all.argmax;
  for (std::int32_t v = 0; v < vocabulary; ++v) {
    const float dz = gradient<TERMS>(host.logit(v), result, host.inverse_softcap);
    row[v] = v == target ? result.target_gradient : dz;
  }
}

}  // namespace

extern "C" {

// `threads` must be a power of two, and larger than the 6 entries that an unaligned slice may have at its ends.
void row_on_host(float* row, std::int64_t vocabulary, std::int64_t target, float weight, float softcap, float z_loss,
                 float smoothing, int parts, int threads, float* loss_and_nll, std::int32_t* argmax) {
  const RowOptions<float> options{softcap, z_loss, smoothing};
  const bool loss = z_loss != 0 || smoothing != 0;
  (softcap != 0 ? run<Terms::SOFTCAP> : loss ? run<Terms::LOSS> : run<Terms::NONE>)(
      row, vocabulary, target, weight, options, parts, threads, loss_and_nll, argmax);
}

// Writes begin, head_end, vectors, tail_begin and end to `out`.
void slice_on_host(std::uint64_t address, std::int64_t vocabulary, int element_bytes, int part, int parts,
                   std::int32_t* out) {
  const Slice s = slice_of(address, vocabulary, element_bytes, part, parts);
  const std::int32_t all[5] = {s.begin, s.head_end, s.vectors, s.tail_begin, s.end};
  for (int i = 0; i < 5; ++i) out[i] = all[i];
}

std::int32_t slice_size_on_host(std::int64_t vocabulary, int element_bytes, int parts) {
  return slice_size(vocabulary, element_bytes, parts);
}

}  // extern "C"
