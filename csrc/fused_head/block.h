// A block of logits, in plain C types.
#pragma once

#include <cstdint>

namespace delib_fast {

using bf16_bits = std::uint16_t;

// A block of logits: some rows of the vocabulary for all tokens of a chunk. A transposed block is stored as (vocabulary,
// tokens), a block by token as (tokens, vocabulary).
template <typename scalar_t>
struct Block {
  scalar_t* data;
  std::int64_t leading;    // elements from the start of one row of the matrix to the next
  std::int64_t first_row;  // the vocabulary entry of row 0
  std::int64_t rows;       // the number of vocabulary entries, in both layouts
};

}  // namespace delib_fast
