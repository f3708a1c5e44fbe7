// The rows of attention between its products: scores to weights, and their gradients, in vectors of AVX-512. Only files of
// processors with AMX may include it.
#pragma once
#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <limits>

#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kWords = 32;  // bfloat16 of the row of a tile: what a step multiplies
constexpr float kLog2E = 1.44269504f, kInfinity = std::numeric_limits<float>::infinity();

// 2^x, relative error 2e-7 (the polynomial of Cephes); 0 below -126, since denormal results take hundreds of cycles. A NaN
// stays one.
inline __m512 power_of_two(__m512 x) {
  const __m512 least = _mm512_set1_ps(-126.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  x = _mm512_max_ps(least, x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.535336188319500e-4f);
  for (const float c : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f,
                        6.931472028550421e-1f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_maskz_scalef_ps(normal, p, n);
}

inline __mmask16 allowed(const bool* mask, int64_t t, int64_t T) {
  const __m128i some = _mm_maskz_loadu_epi8(lanes(T - t), mask + t);
  return _mm_test_epi8_mask(some, some);
}

inline __m512i rounded(__m512 first, __m512 second) {
  return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // 32 bfloat16, to nearest
}

inline void store_rounded(const float* x, int64_t n, float factor, uint16_t* to) {  // n a multiple of 32
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < n; i += kWords)
    _mm512_storeu_si512(to + i, rounded(_mm512_mul_ps(_mm512_loadu_ps(x + i), by),
                                        _mm512_mul_ps(_mm512_loadu_ps(x + i + kVector), by)));
}

struct RowSum {
  float top, sum;  // the largest score, in powers of two, and the sum of 2^(score - top)
};

// scores [columns] of a row -> 2^(scale * score - top) as bfloat16; columns is T, filled up to a multiple of 32
inline RowSum softmax(float* scores, const bool* mask, int64_t T, int64_t columns, float scale, uint16_t* weights) {
  const __m512 by = _mm512_set1_ps(scale), nothing = _mm512_set1_ps(-kInfinity);
  __m512 tops = nothing, sums = _mm512_setzero_ps();
  for (int64_t t = 0; t < columns; t += kVector) {
    const __m512 x = _mm512_mask_mul_ps(nothing, allowed(mask, t, T), _mm512_loadu_ps(scores + t), by);
    _mm512_storeu_ps(scores + t, x);
    tops = _mm512_max_ps(tops, x);
  }
  const float top = _mm512_reduce_max_ps(tops);
  const __m512 least = _mm512_set1_ps(top == -kInfinity ? 0.0f : top);
  for (int64_t t = 0; t < columns; t += kWords) {
    const __m512 first = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + t), least));
    const __m512 second = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + t + kVector), least));
    sums = _mm512_add_ps(sums, _mm512_add_ps(first, second));
    _mm512_storeu_si512(weights + t, rounded(first, second));
  }
  return {top, _mm512_reduce_add_ps(sums)};
}

// scores -> weights, grads of weights -> those of scores (times scale), the latter as bfloat16 too
inline void softmax_backward(float* scores, float* grads, const bool* mask, int64_t T, int64_t columns, float scale,
                             float lse, float mean, uint16_t* rounded_grads) {
  const __m512 by = _mm512_set1_ps(scale * kLog2E), minus = _mm512_set1_ps(-lse * kLog2E);
  const __m512 mean_grad = _mm512_set1_ps(mean), factor = _mm512_set1_ps(scale);
  for (int64_t t = 0; t < columns; t += kWords) {
    __m512 both[2];
    for (int half = 0; half < 2; ++half) {
      const int64_t at = t + half * kVector;
      const __mmask16 there = allowed(mask, at, T);
      const __m512 x = _mm512_maskz_fmadd_ps(there, _mm512_loadu_ps(scores + at), by, minus);
      const __m512 weights = _mm512_maskz_mov_ps(there, power_of_two(x));
      const __m512 centred = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(grads + at), mean_grad), factor);
      both[half] = _mm512_maskz_mul_ps(there, weights, centred);
      _mm512_storeu_ps(scores + at, weights);
      _mm512_storeu_ps(grads + at, both[half]);
    }
    _mm512_storeu_si512(rounded_grads + t, rounded(both[0], both[1]));
  }
}

}  // namespace
}  // namespace qpeft
