// Products of bfloat16 matrices with float32 sums, on processors that have instructions for them: one set of kernels for each
// set of instructions, in a file of its own that only such a processor may run; bfloat16_products.cpp finds out which one this is.
#pragma once
#include <cstdint>

namespace qpeft {

constexpr int64_t kVector = 16;  // float32 sums in a register, or in the row of a tile
constexpr int64_t kColumns = 4 * kVector;  // columns of a tile of b

struct BFloat16Kernels {
  int64_t words;  // rows of b at a time
  int64_t pairs_step;  // packed rows have a multiple of so many pairs
  // n <= 16 rows of a: packed[pair][row] are two neighbours of a row; zeros after the last row and the last pair.
  void (*pack_vector)(const uint16_t* a, int64_t a_stride, int64_t n, int64_t pairs, int64_t packed_pairs,
                      uint32_t* packed);
  // out[n, c] = sum over d of a[n, d] * b[c, d] for the words begin .. end of b [C, 2 * pairs]; a is packed.
  void (*products_of_words)(const uint32_t* packed, int64_t N, int64_t pairs, const uint16_t* b, int64_t b_stride,
                            int64_t begin, int64_t end, float* out, int64_t out_stride);
  int64_t rows;  // rows of a that share packed tiles of b
  int64_t tiles;  // tiles of b that share rows of a
  // total[n, d] += sum over c of a[n, c] * b[c, d] for rows begin .. end of a [N, C] and n_columns <= tiles * kColumns columns
  // of b and total, which point at the first of them.
  void (*add_product_of_columns)(const uint16_t* a, int64_t a_stride, int64_t begin, int64_t end, int64_t C,
                                 const uint16_t* b, int64_t b_stride, int64_t n_columns, float* total,
                                 int64_t total_stride);
};

// The instructions that this processor has: one of these.
constexpr int64_t kInstructionsNone = 0, kInstructionsAvx512Bf16 = 1, kInstructionsAmx = 2;
int64_t bfloat16_instructions();

extern const BFloat16Kernels kAvx512Bf16Kernels, kAmxKernels;

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace qpeft
