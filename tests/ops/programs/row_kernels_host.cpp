// Runs the loops of csrc/linear_cross_entropy/row_kernels_impl.h on a block whose second row starts past 2^31 elements.
// Only two pages of the address range are touched.
#define SIMD_TARGET host
#define SIMD_NAME "host"
#include "linear_cross_entropy/row_kernels_impl.h"

#include <sys/mman.h>

using namespace delib_fast;

extern "C" {

// The logits of 16 tokens are 0 in row 0 and 1 in row 1. For each token, writes the sum, the argmax and the gradients of
// both rows (with a factor of 1) to out[0..3]. Returns 0, or 1 if the address range cannot be reserved.
int far_apart_rows(float (*out)[16]) {
  constexpr std::int64_t LEADING = (std::int64_t{1} << 31) + 64, BYTES = 2 * (LEADING + 64);
  void* space = mmap(nullptr, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return 1;
  auto* data = static_cast<bf16_bits*>(space);
  float max[16], sum[16] = {}, total[16] = {}, shift[16], partial[16], partial_total[16], factor[16], offset[16] = {};
  std::int32_t argmax[16];
  for (int c = 0; c < 16; ++c) {
    data[LEADING + c] = 0x3f80;  // 1
    max[c] = -INFINITY;
    factor[c] = 1;
  }
  const Block<bf16_bits> block{data, LEADING, 0, 2};
  host::ROW_KERNELS.plain_bf16.statistics(block, {max, sum, total, shift, partial, partial_total, argmax}, 0, 0, 16);
  host::ROW_KERNELS.plain_bf16.gradient(block, {max, factor, offset}, 0, 0, 16);
  for (int c = 0; c < 16; ++c) {
    out[0][c] = sum[c];
    out[1][c] = static_cast<float>(argmax[c]);
    out[2][c] = host::load(data + c);
    out[3][c] = host::load(data + LEADING + c);
  }
  munmap(space, BYTES);
  return 0;
}

}  // extern "C"
