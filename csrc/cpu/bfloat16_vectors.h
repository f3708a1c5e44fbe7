// Parts that the kernels of bfloat16_products.h share, in vectors of AVX-512. Only their files may include it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "cpu/bfloat16_products.h"

namespace qpeft {
namespace {

// x[i][j] -> x[j][i] of 16 by 16
inline void transpose(__m512i (&x)[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      x[i + 2 * half] = _mm512_unpacklo_epi64(y[i + half], y[i + 2 + half]);
      x[i + 2 * half + 1] = _mm512_unpackhi_epi64(y[i + half], y[i + 2 + half]);
    }
  for (int j = 0; j < 4; ++j) {  // of rows 4 i .. 4 i + 3, x[4 i + j] has the columns j, 4 + j, 8 + j and 12 + j
    const __m512i even[2] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0x88),
                             _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(x[j], x[4 + j], 0xDD),
                            _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xDD)};
    y[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xDD);
    y[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xDD);
  }
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

inline __mmask16 lanes(int64_t n) { return (1u << std::clamp<int64_t>(n, 0, kVector)) - 1; }

inline void pack_vector(const uint16_t* a, int64_t stride, int64_t n, int64_t pairs, int64_t packed_pairs,
                        uint32_t* packed) {
  for (int64_t pair = 0; pair < packed_pairs; pair += kVector) {
    __m512i x[16];
    for (int64_t r = 0; r < kVector; ++r)
      x[r] = r < n ? _mm512_maskz_loadu_epi32(lanes(pairs - pair), a + r * stride + 2 * pair) : _mm512_setzero_si512();
    transpose(x);
    for (int64_t i = 0; i < std::min(kVector, packed_pairs - pair); ++i)
      _mm512_storeu_si512(packed + (pair + i) * kVector, x[i]);
  }
}

// The lanes of kColumns columns of which n_columns are there.
struct ColumnMasks {
  __mmask16 of[4];
  explicit ColumnMasks(int64_t n_columns) {
    for (int v = 0; v < 4; ++v) of[v] = lanes(n_columns - v * kVector);
  }
};

// Rows c and c + 1 of b (zeros for the second one after the last row), column by column, as pairs.
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
