// Chunk sizes, allocation and checks, and the ops with which the backward pass scales the gradients that the forward pass has computed.
#include <ATen/Parallel.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>

#include "fused_head/bfloat16_gemm.h"
#include "fused_head/head.h"
#include "fused_head/scale_kernels.h"
#include "large_buffer.h"

namespace delib_fast {

std::int64_t equal_chunk(std::int64_t rows, std::int64_t max_rows) {
  constexpr std::int64_t VECTOR = 16;
  const std::int64_t chunks = std::max<std::int64_t>((rows + max_rows - 1) / max_rows, 1);
  const std::int64_t even = (rows + chunks - 1) / chunks;
  return std::max(std::min((even + VECTOR - 1) / VECTOR, max_rows / VECTOR), std::int64_t{1}) * VECTOR;
}

HeadGradients::HeadGradients(const at::Tensor& hidden, const at::Tensor& weight,
                             const std::optional<at::Tensor>& loss_positions, bool need_hidden, bool need_weight,
                             bool keep_dz, std::string_view gemm)
    : need_grad_hidden(need_hidden), need_grad_weight(need_weight) {
  const auto acc = hidden.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto options = hidden.options();
  const bool bfloat16 = gemm == "bfloat16";
  TORCH_CHECK_VALUE(bfloat16 ? hidden.scalar_type() == at::kBFloat16 : gemm == "widened", "gemm=", gemm, " for ",
                    hidden.scalar_type(), "; it must be widened or, for bfloat16 inputs only, bfloat16");
  TORCH_CHECK_VALUE(!keep_dz || (bfloat16 && need_weight && loss_positions),
                    "keep_dz needs need_grad_weight, loss_positions and gemm=bfloat16");
  grad_hidden = need_hidden ? at::zeros(hidden.sizes(), options) : at::empty({0}, options);
  const bool sums = need_weight && !keep_dz;
  grad_weight = sums ? large_empty(weight.sizes(), acc) : at::empty({0}, options.dtype(acc));
  const std::int64_t columns = keep_dz ? leading_dimension(loss_positions->size(0)) : 0;
  dz = keep_dz ? large_empty({weight.size(0), columns}, at::kBFloat16) : at::empty({0}, options);
  rows = at::empty({columns, hidden.size(1)}, options);
}

void HeadGradients::set_to_zero() { grad_weight.zero_(), dz.zero_(), rows.zero_(); }

Candidates::Candidates(const std::optional<at::Tensor>& loss_positions, std::int64_t tokens)
    : tokens_(tokens), size_(tokens) {
  if (!loss_positions) return;
  listed_ = loss_positions->contiguous();
  size_ = listed_.size(0);
  positions_ = listed_.const_data_ptr<std::int64_t>();  // also null if empty
}

std::int64_t Candidates::operator[](std::int64_t i) const {
  const std::int64_t position = positions_ ? positions_[i] : i;
  TORCH_CHECK_VALUE(position >= 0 && position < tokens_, "loss_positions[", i, "] is ", position,
                    ", which is not one of the ", tokens_, " rows of hidden; take it from the same packed batch");
  return position;
}

void check_target(std::int64_t target, std::int64_t position, std::int64_t vocabulary) {
  TORCH_CHECK_VALUE(target >= 0 && target < vocabulary, "targets[", position, "] is ", target,
                    ", which is outside the vocabulary of ", vocabulary,
                    "; check that the tokenizer belongs to the model, or set the target to ignore_index");
}

namespace {

// Whether the processor has bfloat16 instructions. Without them torch's bfloat16 GEMM is many times slower than its
// float32 GEMM, so inputs are widened.
bool has_bfloat16_gemms() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Returns scale * dz (V, K) . rows (K, H) in the dtype of both, rounded once.
at::Tensor weight_gradient(const at::Tensor& dz, const at::Tensor& rows, const at::Tensor& scale) {
  const bool fast = dz.scalar_type() == at::kBFloat16 && dz.is_contiguous() && dz.numel() > 0 && dz.size(1) % 2 == 0;
  if (fast) return bfloat16_product(dz, rows.contiguous(), scale.item<float>());
  // Other dtypes and layouts are only used in tests.
  return at::mm(dz.to(at::kFloat), rows.to(at::kFloat)).mul_(scale.item<float>()).to(dz.scalar_type());
}

template <typename from_t, typename to_t>
void scale_all(ScaleFn<from_t, to_t> scale, const at::Tensor& from, float factor, at::Tensor& to) {
  constexpr std::int64_t MIN_ELEMENTS_PER_THREAD = 1 << 16;
  const auto* source = static_cast<const from_t*>(from.const_data_ptr());
  auto* target = static_cast<to_t*>(to.data_ptr());
  at::parallel_for(0, from.numel(), MIN_ELEMENTS_PER_THREAD, [&](std::int64_t begin, std::int64_t end) {
    scale(source + begin, target + begin, end - begin, factor);
  });
}

// Returns gradient * factor as `dtype`, in one pass that writes to huge pages. at::mul_out with a cast takes eight
// times as long, and without huge pages most of the remaining time is page faults.
at::Tensor scale_gradient(const at::Tensor& gradient, const at::Tensor& factor, at::ScalarType dtype) {
  at::Tensor out = large_empty(gradient.sizes(), dtype);
  const at::Tensor from = gradient.contiguous();
  const ScaleKernels& kernels = scale_kernels();
  const auto from_dtype = from.scalar_type();
  if (from_dtype == at::kFloat && dtype == at::kFloat) {
    scale_all(kernels.f32, from, factor.item<float>(), out);
  } else if (from_dtype == at::kFloat && dtype == at::kBFloat16) {
    scale_all(kernels.f32_to_bf16, from, factor.item<float>(), out);
  } else if (from_dtype == at::kBFloat16 && dtype == at::kBFloat16) {
    scale_all(kernels.bf16, from, factor.item<float>(), out);
  } else {
    out.copy_(from.to(at::kDouble).mul(factor.to(at::kDouble)));  // other dtypes: only used for small tensors in tests
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(delib_fast, CPU, m) {
  m.impl("scale_gradient", &scale_gradient);
  m.impl("weight_gradient", &weight_gradient);
}
TORCH_LIBRARY_FRAGMENT(delib_fast, m) { m.def("has_bfloat16_gemms() -> bool", &has_bfloat16_gemms); }

}  // namespace delib_fast
