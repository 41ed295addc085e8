// Large host buffers whose pages the process keeps and reuses.
#pragma once

#include <ATen/core/Tensor.h>

namespace delib_fast {

// Returns an uninitialised CPU tensor. A large tensor uses huge pages if the system provides them (MADV_HUGEPAGE). When
// the last tensor on a buffer is freed, the buffer is kept for the next call, because the first touch of fresh pages
// costs more than the loss itself (0.3 s for a weight gradient of 136M elements). The process never keeps more memory
// than was in use at one time. Thread-safe.
at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Returns every unused buffer to the system, and reports how many bytes that was.
std::int64_t release_buffers();

}  // namespace delib_fast
