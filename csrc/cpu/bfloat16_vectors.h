// What the kernels of bfloat16_products.h have in common, in vectors of AVX-512: to be included by their files alone.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "cpu/bfloat16_products.h"

namespace qpeft {
namespace {

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

// The sums of 8 words and 16 rows, of which n_words and n_rows count, to out[row, word].
inline void store(const __m512 (&sums)[8], float* out, int64_t stride, int64_t n_rows, int64_t n_words) {
  if (n_rows >= kVector && n_words >= 8) {
    __m256 half[8];
    for (int c = 0; c < 8; ++c) half[c] = _mm512_castps512_ps256(sums[c]);
    store_transposed(half, out, stride);
    for (int c = 0; c < 8; ++c) half[c] = _mm512_extractf32x8_ps(sums[c], 1);
    store_transposed(half, out + 8 * stride, stride);
    return;
  }
  float columns[8][kVector];
  for (int c = 0; c < 8; ++c) _mm512_storeu_ps(columns[c], sums[c]);
  for (int64_t r = 0; r < std::min(n_rows, kVector); ++r)
    for (int64_t c = 0; c < std::min<int64_t>(n_words, 8); ++c) out[r * stride + c] = columns[c][r];
}

// The lanes of kColumns columns of which n_columns are there.
struct ColumnMasks {
  __mmask16 of[4];
  explicit ColumnMasks(int64_t n_columns) {
    for (int v = 0; v < 4; ++v) of[v] = (1u << std::clamp<int64_t>(n_columns - v * kVector, 0, kVector)) - 1;
  }
};

// Rows c and c + 1 of b (zeros for the latter behind the last), column by column, as pairs.
inline void pack_pairs(const uint16_t* b, int64_t b_stride, int64_t n, const ColumnMasks& mask, uint32_t* tile) {
  for (int64_t c = 0; c < n; c += 2, tile += kColumns)
    for (int v = 0; v < 4; ++v) {
      const uint16_t* at = b + c * b_stride + v * kVector;
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask.of[v], at));
      const __m512i high = c + 1 == n ? _mm512_setzero_si512()
                                      : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask.of[v], at + b_stride));
      _mm512_storeu_si512(tile + v * kVector, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

}  // namespace
}  // namespace qpeft
