// A block of transposed logits, in plain C types.
#pragma once

#include <cstdint>

namespace delib_fast {

using bf16_bits = std::uint16_t;

// A block of transposed logits: some rows of the vocabulary for all tokens of a chunk.
template <typename scalar_t>
struct Block {
  scalar_t* data;
  std::int64_t leading;    // elements from the start of one row to the next
  std::int64_t first_row;  // the vocabulary entry of row 0
  std::int64_t rows;
};

}  // namespace delib_fast
