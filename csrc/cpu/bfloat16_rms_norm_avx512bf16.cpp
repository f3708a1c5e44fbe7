// The kernels of bfloat16_rms_norm.h. A row is read twice, the second time from the first cache.
#include "cpu/bfloat16_rms_norm.h"

#include <cmath>

#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

inline __m512 widen(const uint16_t* x, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

inline __m256i narrow(__m512 x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline __m512 rounded(__m512 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16)); }

// f(d, lanes) for the vectors of a row
template <typename F>
inline void for_vectors(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + kVector <= D; d += kVector) f(d, lanes(kVector));
  if (d < D) f(d, lanes(D - d));
}

}  // namespace

void rms_norm_rows(const uint16_t* x, int64_t x_stride, const uint16_t* weight, float eps, int64_t begin, int64_t end,
                   int64_t D, uint16_t* out, float* scale) {
  for (int64_t n = begin; n < end; ++n) {
    const uint16_t* from = x + n * x_stride;
    uint16_t* to = out + n * D;
    __m512 squares = _mm512_setzero_ps();
    for_vectors(D, [&](int64_t d, __mmask16 mask) {
      const __m512 v = widen(from + d, mask);
      squares = _mm512_fmadd_ps(v, v, squares);
    });
    scale[n] = 1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / static_cast<float>(D) + eps);
    const __m512 factor = _mm512_set1_ps(scale[n]);
    for_vectors(D, [&](int64_t d, __mmask16 mask) {
      const __m512 hidden = rounded(_mm512_mul_ps(widen(from + d, mask), factor));
      _mm256_mask_storeu_epi16(to + d, mask, narrow(_mm512_mul_ps(widen(weight + d, mask), hidden)));
    });
  }
}

void rms_norm_rows_backward(const uint16_t* grad, const uint16_t* x, int64_t x_stride, const uint16_t* weight,
                            const float* scale, int64_t begin, int64_t end, int64_t D, uint16_t* grad_x) {
  for (int64_t n = begin; n < end; ++n) {
    const uint16_t *from = x + n * x_stride, *of_out = grad + n * D;
    uint16_t* to = grad_x + n * D;
    __m512 products = _mm512_setzero_ps();
    for_vectors(D, [&](int64_t d, __mmask16 mask) {
      const __m512 g = _mm512_mul_ps(widen(of_out + d, mask), widen(weight + d, mask));
      products = _mm512_fmadd_ps(g, widen(from + d, mask), products);
    });
    const float s = scale[n], along_x = s * s * s * _mm512_reduce_add_ps(products) / static_cast<float>(D);
    const __m512 factor = _mm512_set1_ps(s), minus = _mm512_set1_ps(along_x);
    for_vectors(D, [&](int64_t d, __mmask16 mask) {
      const __m512 g = _mm512_mul_ps(widen(of_out + d, mask), widen(weight + d, mask));
      const __m512 own = _mm512_mul_ps(g, factor);
      _mm256_mask_storeu_epi16(to + d, mask, narrow(_mm512_fnmadd_ps(minus, widen(from + d, mask), own)));
    });
  }
}

}  // namespace qpeft
