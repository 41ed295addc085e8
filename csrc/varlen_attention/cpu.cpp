// Packed causal attention on a CPU, with one task per sequence and kv head. Threads take the longest tasks first.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "varlen_attention/kernels.h"

namespace delib_fast {
namespace {

using attention::Backward;
using attention::bf16_bits;
using attention::Forward;
using attention::Heads;
using attention::Problem;

struct Task {
  std::int64_t begin, length, kv_head;
};

// Returns a task per sequence and kv head, longest first, so that no thread starts a long task last.
std::vector<Task> tasks_of(const at::Tensor& cu_seqlens, std::int64_t kv_heads) {
  std::vector<Task> tasks;
  const at::Tensor host = cu_seqlens.contiguous();
  const auto* offsets = host.const_data_ptr<std::int32_t>();
  for (std::int64_t sequence = 0; sequence + 1 < host.numel(); ++sequence)
    for (std::int64_t head = 0; head < kv_heads && offsets[sequence + 1] > offsets[sequence]; ++head)
      tasks.push_back({offsets[sequence], offsets[sequence + 1] - offsets[sequence], head});
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.length > b.length; });
  return tasks;
}

template <typename work_t>
void for_each_task(const std::vector<Task>& tasks, std::int64_t scratch, const work_t& work) {
  std::atomic<std::size_t> next{0};
  const auto threads = std::min<std::int64_t>(at::get_num_threads(), static_cast<std::int64_t>(tasks.size()));
  const at::Tensor memory = at::empty({threads * scratch}, at::kFloat);
  at::parallel_for(0, threads, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t thread = first; thread < last; ++thread)
      for (std::size_t i = next++; i < tasks.size(); i = next++)
        work(tasks[i], memory.data_ptr<float>() + thread * scratch);
  });
}

// Returns a view of a (T, H, D) tensor that starts at `token` and `head`.
template <typename to_t, typename scalar_t>
Heads<to_t> heads(const at::Tensor& x, std::int64_t token, std::int64_t head) {
  auto* data = static_cast<scalar_t*>(x.data_ptr());
  return {data + token * x.stride(0) + head * x.stride(1), x.stride(0), x.stride(1)};
}

at::Tensor last_dim_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

void check(const at::Tensor& q, const at::Tensor& v) {
  TORCH_CHECK_VALUE(q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16,
                    "varlen_attention_compiled: q is ", q.scalar_type(), "; it must be float32 or bfloat16");
  for (const std::int64_t dim : {q.size(2), v.size(2)})
    TORCH_CHECK_VALUE(dim > 0 && dim % attention::D_MULTIPLE == 0 && dim <= attention::MAX_D,
                      "varlen_attention_compiled: a head dim is ", dim, "; it must be a multiple of 16 and at most 256");
}

Problem problem_of(const Task& task, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, double scale,
                   std::int64_t window, double softcap) {
  return {task.length,
          q.size(2),
          v.size(2),
          q.size(1) / k.size(1),
          window > 0 ? window : task.length,
          static_cast<float>(scale),
          static_cast<float>(softcap)};
}

template <typename scalar_t, typename kernel_t>
void forward_all(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const float* sinks,
                 const at::Tensor& cu_seqlens, double scale, std::int64_t window, double softcap, const at::Tensor& out,
                 const at::Tensor& lse, kernel_t kernel) {
  const std::int64_t group = q.size(1) / k.size(1);
  const auto tasks = tasks_of(cu_seqlens, k.size(1));
  if (tasks.empty()) return;
  const std::int64_t scratch_floats = attention::forward_scratch(tasks[0].length, q.size(2), v.size(2));
  for_each_task(tasks, scratch_floats, [&](const Task& task, float* scratch) {
    const std::int64_t t = task.begin, h = task.kv_head;
    kernel({problem_of(task, q, k, v, scale, window, softcap), heads<const scalar_t, scalar_t>(q, t, h * group),
            heads<const scalar_t, scalar_t>(k, t, h), heads<const scalar_t, scalar_t>(v, t, h),
            heads<scalar_t, scalar_t>(out, t, h * group), heads<float, float>(lse, t, h * group),
            sinks == nullptr ? nullptr : sinks + h * group},
           scratch);
  });
}

// Returns out (T, Hq, V) in the dtype of q, and the log-sum-exp of the scores and the sink (T, Hq, 1) in float32.
// `sinks` is (Hq,) float32. A window or softcap of 0 means none.
std::tuple<at::Tensor, at::Tensor> varlen_attention_compiled(const at::Tensor& q_, const at::Tensor& k_,
                                                             const at::Tensor& v_,
                                                             const std::optional<at::Tensor>& sinks_,
                                                             const at::Tensor& cu_seqlens, double scale,
                                                             std::int64_t window, double softcap) {
  check(q_, v_);
  TORCH_CHECK_VALUE(!sinks_ || (sinks_->scalar_type() == at::kFloat && sinks_->numel() == q_.size(1)),
                    "varlen_attention_compiled: sinks must be float32, one per query head");
  const at::Tensor q = last_dim_contiguous(q_), k = last_dim_contiguous(k_), v = last_dim_contiguous(v_);
  const at::Tensor sinks = sinks_ ? sinks_->contiguous() : at::Tensor();
  const float* sink_of_head = sinks_ ? sinks.const_data_ptr<float>() : nullptr;
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  at::Tensor lse = at::empty({q.size(0), q.size(1), 1}, q.options().dtype(at::kFloat));
  const auto& table = attention::kernels();
  if (q.scalar_type() == at::kFloat) {
    forward_all<float>(q, k, v, sink_of_head, cu_seqlens, scale, window, softcap, out, lse, table.forward_f32);
  } else {
    const auto* bf16 = attention::bf16_kernels();
    forward_all<bf16_bits>(q, k, v, sink_of_head, cu_seqlens, scale, window, softcap, out, lse,
                           bf16 == nullptr ? table.forward_bf16 : bf16->forward);
  }
  return {out, lse};
}

template <typename scalar_t, typename kernel_t>
void backward_all(const at::Tensor& d_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& out, const at::Tensor& lse, const at::Tensor& cu_seqlens, double scale,
                  std::int64_t window, double softcap, const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv,
                  kernel_t kernel) {
  const std::int64_t group = q.size(1) / k.size(1);
  const auto tasks = tasks_of(cu_seqlens, k.size(1));
  if (tasks.empty()) return;
  const std::int64_t scratch_floats = attention::backward_scratch(tasks[0].length, q.size(2), v.size(2));
  for_each_task(tasks, scratch_floats, [&](const Task& task, float* scratch) {
    const std::int64_t t = task.begin, h = task.kv_head;
    const auto in = [&](const at::Tensor& x, std::int64_t head) { return heads<const scalar_t, scalar_t>(x, t, head); };
    const auto to = [&](const at::Tensor& x, std::int64_t head) { return heads<scalar_t, scalar_t>(x, t, head); };
    kernel({problem_of(task, q, k, v, scale, window, softcap), in(d_out, h * group), in(q, h * group), in(k, h),
            in(v, h), in(out, h * group), heads<const float, float>(lse, t, h * group), to(dq, h * group), to(dk, h),
            to(dv, h)},
           scratch);
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_compiled_backward(
    const at::Tensor& d_out_, const at::Tensor& q_, const at::Tensor& k_, const at::Tensor& v_, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens, double scale, std::int64_t window, double softcap) {
  check(q_, v_);
  const at::Tensor q = last_dim_contiguous(q_), k = last_dim_contiguous(k_), v = last_dim_contiguous(v_);
  const at::Tensor d_out = last_dim_contiguous(d_out_);
  at::Tensor dq = at::empty(q.sizes(), q.options());
  at::Tensor dk = at::empty(k.sizes(), k.options()), dv = at::empty(v.sizes(), v.options());
  const auto& table = attention::kernels();
  if (q.scalar_type() == at::kFloat) {
    backward_all<float>(d_out, q, k, v, out, lse, cu_seqlens, scale, window, softcap, dq, dk, dv, table.backward_f32);
  } else {
    const auto* bf16 = attention::bf16_kernels();
    backward_all<bf16_bits>(d_out, q, k, v, out, lse, cu_seqlens, scale, window, softcap, dq, dk, dv,
                            bf16 == nullptr ? table.backward_bf16 : bf16->backward);
  }
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_IMPL(delib_fast, CPU, m) {
  m.impl("varlen_attention_compiled", &varlen_attention_compiled);
  m.impl("varlen_attention_compiled_backward", &varlen_attention_compiled_backward);
}

}  // namespace delib_fast
