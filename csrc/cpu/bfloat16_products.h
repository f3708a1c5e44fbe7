// Products of bfloat16 matrices with float32 sums, on processors that have instructions for them. Everything here is in
// bfloat16_products_avx512bf16.cpp, which only such a processor may run; bfloat16_products.cpp asks which this one is.
#pragma once
#include <cstdint>

namespace qpeft {

constexpr int64_t kVector = 16;  // float32 sums in a register
constexpr int64_t kWords = 8;    // rows of b at a time
constexpr int64_t kColumns = 4 * kVector;  // columns of a sum at a time

// a [N, 2 * pairs] as vectors of 16 rows: packed[v][pair][row of the vector] are two neighbours of a row; zeros behind N.
void pack_vectors(const uint16_t* a, int64_t stride, int64_t N, int64_t pairs, uint32_t* packed);

// out[n, c] = sum over d of a[n, d] * b[c, d] for the words begin .. end of b [C, 2 * pairs]; a is packed.
void products_of_words(const uint32_t* packed, int64_t N, int64_t pairs, const uint16_t* b, int64_t b_stride, int64_t begin,
                       int64_t end, float* out, int64_t out_stride);

// total[n, d] += sum over c of a[n, c] * b[c, d] for rows begin .. end of a [N, C] and n_columns <= kColumns columns of b and
// total, which point at the first of them. tile: memory for kTilePairs * kColumns pairs.
constexpr int64_t kTilePairs = 128;
void add_product_of_columns(const uint16_t* a, int64_t a_stride, int64_t begin, int64_t end, int64_t C, const uint16_t* b,
                            int64_t b_stride, int64_t n_columns, float* total, int64_t total_stride, uint32_t* tile);

}  // namespace qpeft
