// Large host buffers whose pages stay with the process.
#pragma once

#include <ATen/core/Tensor.h>

namespace delib_fast {

// An uninitialised CPU tensor. A large one lies on huge pages where the system gives them (MADV_HUGEPAGE), and its
// memory is kept for the next one when the last tensor on it goes: first touches of fresh pages cost more than the
// loss (0.3 s of a weight gradient of 136M elements). Never keeps more than was in use at one moment; thread-safe.
at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Gives back to the system what is kept and not in use; how many bytes that was.
std::int64_t release_buffers();

}  // namespace delib_fast
