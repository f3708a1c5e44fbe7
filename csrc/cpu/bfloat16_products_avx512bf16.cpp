// The products of bfloat16_products.h with VDPBF16PS: two products and two additions in float32 for each of 16 sums, at
// twice the rate of float32. 24 sums are in registers; each step reads at most 11 others.
#include <cstring>

#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kWords = 8;
constexpr int64_t kTilePairs = 128;  // of words, packed at a time

inline __m512i pair_for_all(const void* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

// rows[i][j] -> columns[j][i] of 8 by 8
inline void store_transposed(const __m256 (&x)[8], float* out, int64_t stride) {
  __m256 pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], 0x44);
      fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], 0xEE);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}

// The sums of kWords words and 16 rows, of which n_words and n_rows count, to out[row, word].
inline void store(const __m512 (&sums)[kWords], float* out, int64_t stride, int64_t n_rows, int64_t n_words) {
  if (n_rows >= kVector && n_words == kWords) {
    __m256 half[8];
    for (int c = 0; c < kWords; ++c) half[c] = _mm512_castps512_ps256(sums[c]);
    store_transposed(half, out, stride);
    for (int c = 0; c < kWords; ++c) half[c] = _mm512_extractf32x8_ps(sums[c], 1);
    store_transposed(half, out + 8 * stride, stride);
    return;
  }
  float columns[kWords][kVector];
  for (int c = 0; c < kWords; ++c) _mm512_storeu_ps(columns[c], sums[c]);
  for (int64_t r = 0; r < std::min(n_rows, kVector); ++r)
    for (int64_t c = 0; c < n_words; ++c) out[r * stride + c] = columns[c][r];
}

template <int kVectors>
void products(const uint32_t* packed, int64_t n_rows, int64_t pairs, const uint16_t* b, int64_t b_stride,
              int64_t n_words, float* out, int64_t out_stride) {
  const uint16_t* word[kWords];  // after the last word, the last word again
  for (int64_t c = 0; c < kWords; ++c) word[c] = b + std::min(c, n_words - 1) * b_stride;
  __m512 sums[kVectors][kWords];
  for (auto& of_vector : sums)
    for (__m512& sum : of_vector) sum = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i a[kVectors];
    for (int v = 0; v < kVectors; ++v) a[v] = _mm512_loadu_si512(packed + (v * pairs + pair) * kVector);
#pragma GCC unroll 8
    for (int c = 0; c < kWords; ++c) {
      const __m512i w = pair_for_all(word[c] + 2 * pair);
      for (int v = 0; v < kVectors; ++v) sums[v][c] = multiply_add(sums[v][c], a[v], w);
    }
  }
  for (int v = 0; v < kVectors; ++v)
    store(sums[v], out + v * kVector * out_stride, out_stride, n_rows - v * kVector, n_words);
}

template <int kRows>
void add_tile(const uint16_t* a, int64_t a_stride, int64_t n, const uint32_t* tile, const ColumnMasks& mask,
              float* total, int64_t total_stride) {
  __m512 sums[kRows][4];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) sums[r][v] = _mm512_maskz_loadu_ps(mask.of[v], total + r * total_stride + v * kVector);
  for (int64_t pair = 0; pair < n / 2; ++pair) {
    __m512i b[4];
    for (int v = 0; v < 4; ++v) b[v] = _mm512_loadu_si512(tile + pair * kColumns + v * kVector);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512i weights = pair_for_all(a + r * a_stride + 2 * pair);
      for (int v = 0; v < 4; ++v) sums[r][v] = multiply_add(sums[r][v], weights, b[v]);
    }
  }
  if (n % 2)  // the last number only: there may be no memory after it
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < 4; ++v)
        sums[r][v] = multiply_add(sums[r][v], _mm512_set1_epi32(a[r * a_stride + n - 1]),
                                  _mm512_loadu_si512(tile + n / 2 * kColumns + v * kVector));
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 4; ++v) _mm512_mask_storeu_ps(total + r * total_stride + v * kVector, mask.of[v], sums[r][v]);
}

void products_of_words(const uint32_t* packed, int64_t N, int64_t pairs, const uint16_t* b, int64_t b_stride,
                       int64_t begin, int64_t end, float* out, int64_t out_stride) {
  // these rows stay in the cache for all words
  for (int64_t n = 0; n < N; n += 3 * kVector, packed += 3 * pairs * kVector) {
    const int64_t rows = std::min(3 * kVector, N - n);
    const auto some = rows > 2 * kVector ? products<3> : rows > kVector ? products<2> : products<1>;
    for (int64_t c = begin; c < end; c += kWords)
      some(packed, rows, pairs, b + c * b_stride, b_stride, std::min(kWords, end - c), out + n * out_stride + c,
           out_stride);
  }
}

void add_product_of_columns(const uint16_t* a, int64_t a_stride, int64_t begin, int64_t end, int64_t C,
                            const uint16_t* b, int64_t b_stride, int64_t n_columns, float* total,
                            int64_t total_stride) {
  alignas(64) uint32_t tile[kTilePairs * kColumns];
  const ColumnMasks mask(n_columns);
  for (int64_t c = 0; c < C; c += 2 * kTilePairs) {
    const int64_t n = std::min(2 * kTilePairs, C - c);
    pack_pairs(b + c * b_stride, b_stride, n, mask, tile);
    int64_t r = begin;
    const auto next = [&](auto add, int64_t rows) {
      add(a + r * a_stride + c, a_stride, n, tile, mask, total + r * total_stride, total_stride);
      r += rows;
    };
    while (r + 6 <= end) next(add_tile<6>, 6);
    if (r + 4 <= end) next(add_tile<4>, 4);
    if (r + 2 <= end) next(add_tile<2>, 2);
    if (r < end) next(add_tile<1>, 1);
  }
}

}  // namespace

const BFloat16Kernels kAvx512Bf16Kernels = {kWords, 1, pack_vector, products_of_words, 192, 1, add_product_of_columns};

}  // namespace qpeft
