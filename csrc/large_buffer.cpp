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
constexpr std::size_t WORTH_KEEPING = 4 * HUGE_PAGE;  // smaller ones are malloc's business

struct Span {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Whole huge pages, at an address that is a multiple of one.
Span map_pages(std::size_t bytes) {
  const std::size_t room = bytes + HUGE_PAGE;
  void* mapped = mmap(nullptr, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK_WITH(OutOfMemoryError, mapped != MAP_FAILED, "no memory for a buffer of ", bytes, " bytes");
  const auto begin = reinterpret_cast<std::uintptr_t>(mapped);
  const std::uintptr_t aligned = (begin + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  if (aligned > begin) munmap(mapped, aligned - begin);
  if (begin + room > aligned + bytes) munmap(reinterpret_cast<void*>(aligned + bytes), begin + room - aligned - bytes);
  madvise(reinterpret_cast<void*>(aligned), bytes, MADV_HUGEPAGE);  // a wish: may be refused
  return {reinterpret_cast<void*>(aligned), bytes};
}

class Pool {
 public:
  Span take(std::size_t wanted) {
    const std::size_t bytes = (wanted + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool full = used_ + kept_ + bytes > most_used_;  // then any that is large enough, rather than fresh pages
    auto best = free_.end();
    for (auto span = free_.begin(); span != free_.end(); ++span) {
      const bool fits = span->bytes >= bytes && (full || span->bytes <= bytes + bytes / 2);
      if (fits && (best == free_.end() || span->bytes <= best->bytes)) best = span;  // the latest of equal ones
    }
    Span span;
    if (best != free_.end()) {
      span = *best;
      free_.erase(best);
      kept_ -= span.bytes;
    } else {
      while (!free_.empty() && used_ + kept_ + bytes > most_used_) drop_oldest();
      span = map_pages(bytes);
    }
    used_ += span.bytes;
    most_used_ = std::max(most_used_, used_);
    return span;
  }

  void give(Span span) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(span);
    used_ -= span.bytes;
    kept_ += span.bytes;
  }

  std::size_t release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t bytes = kept_;
    while (!free_.empty()) drop_oldest();
    most_used_ = used_;
    return bytes;
  }

 private:
  void drop_oldest() {
    munmap(free_.front().data, free_.front().bytes);
    kept_ -= free_.front().bytes;
    free_.erase(free_.begin());
  }

  std::mutex mutex_;
  std::vector<Span> free_;  // oldest first
  std::size_t used_ = 0, kept_ = 0, most_used_ = 0;
};

Pool& pool() {
  static Pool* const lives_on = new Pool;  // tensors may go after the statics
  return *lives_on;
}

}  // namespace

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const auto options = at::TensorOptions().dtype(dtype);
  const auto bytes = static_cast<std::size_t>(c10::multiply_integers(sizes)) * c10::elementSize(dtype);
  if (bytes < WORTH_KEEPING) return at::empty(sizes, options);
  const Span span = pool().take(bytes);
  return at::from_blob(span.data, sizes, [span](void*) { pool().give(span); }, options);
}

std::int64_t release_buffers() { return static_cast<std::int64_t>(pool().release()); }

#else

at::Tensor large_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, at::TensorOptions().dtype(dtype));
}

std::int64_t release_buffers() { return 0; }

#endif

TORCH_LIBRARY_FRAGMENT(delib_fast, m) { m.def("release_buffers() -> int", &release_buffers); }

}  // namespace delib_fast
