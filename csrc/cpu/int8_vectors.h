// What the kernels of int8_linear.h share, in vectors of AVX-512. Only their files may include it.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <memory>

#include "cpu/int8_linear.h"

namespace qpeft {
namespace {

// The outputs of a block: what turns integer sums into them.
struct Outputs {
  const Int8Layer& layer;
  const int64_t c;
  __m512 scale, bias;
  __m512i zero;
  Outputs(const Int8Layer& layer, int64_t c)
      : layer(layer),
        c(c),
        scale(_mm512_loadu_ps(layer.scale + c)),
        bias(layer.bias ? _mm512_loadu_ps(layer.bias + c) : _mm512_setzero_ps()),
        zero(_mm512_slli_epi32(_mm512_loadu_si512(layer.sums + c), 7)) {}

  void store(__m512i sums, const Int8Rows& rows, int64_t r, float* out) const {
    __m512 whole = bias;
    for (int64_t i = 0; i < layer.R; ++i)
      whole = _mm512_fmadd_ps(_mm512_set1_ps(rows.exact[r * layer.R + i]),
                              _mm512_loadu_ps(layer.exact + i * layer.C + c), whole);
    const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sums, zero)), scale);
    _mm512_storeu_ps(out + r * layer.C, _mm512_fmadd_ps(product, _mm512_set1_ps(rows.scale[r]), whole));
  }
};

// x[i] + x[j] and x[i] - x[j] of the pairs (i, j = i ^ distance) of a vector, at i and at j; exchanged: x[j] at i
inline __m512 butterfly(__m512 x, __m512 exchanged, __mmask16 second) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, exchanged), second, exchanged, x);
}

// 64 numbers times the Hadamard matrix H[i, j] = (-1)^(number of bits that i and j share)
inline void turn(float* x) {
  __m512 v[4], w[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_ps(x + 16 * i);
  for (int i = 0; i < 4; i += 2) w[i] = _mm512_add_ps(v[i], v[i + 1]), w[i + 1] = _mm512_sub_ps(v[i], v[i + 1]);
  for (int i = 0; i < 2; ++i) v[i] = _mm512_add_ps(w[i], w[i + 2]), v[i + 2] = _mm512_sub_ps(w[i], w[i + 2]);
  for (int i = 0; i < 4; ++i) {
    v[i] = butterfly(v[i], _mm512_permute_ps(v[i], 0xB1), 0xAAAA);
    v[i] = butterfly(v[i], _mm512_permute_ps(v[i], 0x4E), 0xCCCC);
    v[i] = butterfly(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xB1), 0xF0F0);
    v[i] = butterfly(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E), 0xFF00);
    _mm512_storeu_ps(x + 16 * i, v[i]);
  }
}

inline void quantize_rows(const float* x, int64_t stride, int64_t begin, int64_t end, const Int8Layer& layer,
                          const Int8Rows& rows) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF), zero = _mm512_set1_epi32(kInt8Zero);
  const int64_t D = layer.D, R = layer.R;
  const std::unique_ptr<float[]> row(new float[D]);
  for (int64_t n = begin; n < end; ++n) {
    std::memcpy(row.get(), x + n * stride, D * sizeof(float));
    for (int64_t i = 0; i < R; ++i) {
      rows.exact[n * R + i] = row[layer.columns[i]];
      row[layer.columns[i]] = 0;
    }
    __m512i most = _mm512_setzero_si512();  // as integers, in which a NaN is larger than every number
    for (int64_t d = 0; d < D; d += kInt8Turned) {
      turn(row.get() + d);
      for (int64_t i = 0; i < kInt8Turned; i += 16)
        most = _mm512_max_epi32(most, _mm512_and_si512(magnitude, _mm512_loadu_si512(row.get() + d + i)));
    }
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most))));
    rows.scale[n] = largest / 127.0f;
    const __m512 factor = _mm512_set1_ps(largest > kInt8Tiny ? 127.0f / largest : 0.0f);
    for (int64_t d = 0; d < D; d += 16) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row.get() + d), factor));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows.bytes + n * D + d),
                       _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, zero)));
    }
  }
}

// `multiply` of int8_linear.h by kRows rows at a time: multiply_rows(rows, how many of them count, one or two Outputs, out)
template <int64_t kRows, typename F>
void multiply_blocks(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c, int64_t words, float* out,
                     const F& multiply_rows) {
  const auto by_rows = [&](const auto& outputs) {
    for (int64_t r = 0; r < n; r += kRows) multiply_rows(rows.from(r, layer), n - r, outputs, out + r * layer.C);
  };
  if (words == kInt8Group) {
    const Outputs outputs[] = {{layer, c}, {layer, c + kInt8Words}};
    by_rows(outputs);
  } else {
    const Outputs outputs[] = {{layer, c}};
    by_rows(outputs);
  }
}

}  // namespace
}  // namespace qpeft
