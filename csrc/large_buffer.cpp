#include "large_buffer.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace delib_fast {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

constexpr std::size_t HUGE_PAGE = std::size_t{1} << 21;
constexpr std::size_t MIN_POOLED_BYTES = 4 * HUGE_PAGE;  // smaller buffers are left to malloc

struct Span {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Maps whole huge pages at an address that is a multiple of the huge page size.
Span map_pages(std::size_t bytes) {
  const std::size_t mapped_bytes = bytes + HUGE_PAGE;
  constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "cannot allocate a buffer of ", bytes, " bytes");
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (aligned > begin) munmap(mapped, aligned - begin);
  const std::uintptr_t mapped_end = begin + mapped_bytes, aligned_end = aligned + bytes;
  if (mapped_end > aligned_end) munmap(reinterpret_cast<void*>(aligned_end), mapped_end - aligned_end);
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // the kernel may ignore it
  return {reinterpret_cast<void*>(aligned), bytes};
}

class Pool {
 public:
  Span acquire(std::size_t requested) {
    const std::size_t bytes = (requested + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const std::lock_guard<std::mutex> lock(mutex_);
    // If new pages would exceed the peak usage, any buffer that is large enough is taken instead.
    const bool full = used_ + unused_ + bytes > peak_used_;
    auto best = unused_spans_.end();
    for (auto span = unused_spans_.begin(); span != unused_spans_.end(); ++span) {
      const bool fits = span->bytes >= bytes && (full || span->bytes <= bytes + bytes / 2);
      if (fits && (best == unused_spans_.end() || span->bytes <= best->bytes)) best = span;  // the newest of equal size
    }
    Span span;
    if (best != unused_spans_.end()) {
      span = *best;
      unused_spans_.erase(best);
      unused_ -= span.bytes;
    } else {
      while (!unused_spans_.empty() && used_ + unused_ + bytes > peak_used_) drop_oldest();
      span = map_pages(bytes);
    }
    used_ += span.bytes;
    peak_used_ = std::max(peak_used_, used_);
    return span;
  }

  void release(Span span) {
    const std::lock_guard<std::mutex> lock(mutex_);
    unused_spans_.push_back(span);
    used_ -= span.bytes;
    unused_ += span.bytes;
  }

  std::size_t release_unused() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t bytes = unused_;
    while (!unused_spans_.empty()) drop_oldest();
    peak_used_ = used_;
    return bytes;
  }

 private:
  void drop_oldest() {
    munmap(unused_spans_.front().data, unused_spans_.front().bytes);
    unused_ -= unused_spans_.front().bytes;
    unused_spans_.erase(unused_spans_.begin());
  }

  std::mutex mutex_;
  std::vector<Span> unused_spans_;  // oldest first
  std::size_t used_ = 0, unused_ = 0, peak_used_ = 0;
};

Pool& pool() {
  static Pool* const instance = new Pool;  // never destroyed: a tensor may outlive the static objects
  return *instance;
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  const auto bytes = static_cast<std::size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (bytes < MIN_POOLED_BYTES) return at::empty(sizes, options);
  const Span span = pool().acquire(bytes);
  return at::from_blob(span.data, sizes, [span](void*) { pool().release(span); }, options);
}

std::int64_t release_buffers() { return static_cast<std::int64_t>(pool().release_unused()); }

#else

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions().dtype(dtype));
}

std::int64_t release_buffers() { return 0; }

#endif

TORCH_LIBRARY_FRAGMENT(delib_fast, m) { m.def("release_buffers() -> int", &release_buffers); }

}  // namespace delib_fast
