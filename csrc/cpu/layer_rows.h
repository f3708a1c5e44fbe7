// The loops of layer_kernels.h, for each set of instructions that a file which includes this is compiled for. They are plain code,
// but for bfloat16 with AVX512-BF16. A number does not depend on how many others a thread computes.
#pragma once
#include <bit>
#include <type_traits>

#include "cpu/common.h"
#include "cpu/layer_kernels.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace qpeft {
namespace {

// Up to kBlock numbers of a row: those of float32 where they lie, those of bfloat16 in a buffer, since loops of one width are
// vectorised and loops of two often are not.
constexpr int64_t kBlock = 64;

#if defined(__AVX512BF16__)
constexpr int64_t kVector = 16;
inline __mmask16 lanes(int64_t n) { return n < kVector ? (1u << n) - 1 : 0xFFFF; }
inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow_vector(const float* x, __mmask16 mask) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x)));
}
#endif

QPEFT_INLINE inline const float* widened(const float* x, int64_t, float*) { return x; }
QPEFT_INLINE inline const float* widened(const uint16_t* x, int64_t n, float* buffer) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += kVector)
    _mm512_storeu_ps(buffer + i, wide(_mm256_maskz_loadu_epi16(lanes(n - i), x + i)));
#else
  for (int64_t i = 0; i < n; ++i) buffer[i] = std::bit_cast<float>(static_cast<uint32_t>(x[i]) << 16);
#endif
  return buffer;
}

QPEFT_INLINE inline float* place_for(float* out, float*) { return out; }
QPEFT_INLINE inline float* place_for(uint16_t*, float* buffer) { return buffer; }

// To nearest, ties to even
QPEFT_INLINE inline void narrow(const float*, int64_t, float*) {}
QPEFT_INLINE inline void narrow(const float* x, int64_t n, uint16_t* out) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += kVector) {
    const __mmask16 mask = lanes(n - i);
    _mm256_mask_storeu_epi16(out + i, mask, narrow_vector(x + i, mask));
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<uint32_t>(x[i]);
    out[i] = x[i] != x[i] ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  }
#endif
}

// Rounds to T
template <typename T>
QPEFT_INLINE inline void round_as(float* x, int64_t n) {
  if constexpr (std::is_same_v<T, uint16_t>) {
#if defined(__AVX512BF16__)
    for (int64_t i = 0; i < n; i += kVector) {
      const __mmask16 mask = lanes(n - i);
      _mm512_mask_storeu_ps(x + i, mask, wide(narrow_vector(x + i, mask)));
    }
#else
    for (int64_t i = 0; i < n; ++i) {
      const auto bits = std::bit_cast<uint32_t>(x[i]);
      x[i] = x[i] != x[i] ? x[i] : std::bit_cast<float>((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
    }
#endif
  }
}

// f(d, n) for the blocks of a row
template <typename F>
QPEFT_INLINE inline void for_blocks(int64_t D, const F& f) {
  int64_t d = 0;
  for (; d + kBlock <= D; d += kBlock) f(d, kBlock);
  if (d < D) f(d, D - d);
}

// ---- root-mean-square norm ----------------------------------------------------------------------------------------------

constexpr int kLanes = 16;  // partial sums: the compiler may not reorder one sum, but vectorises sixteen
static_assert(kBlock % kLanes == 0);

struct Sum {
  float lane[kLanes] = {};
  // Adds f(i) for i < n <= kBlock
  template <typename F>
  QPEFT_INLINE void add(int64_t n, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) lane[l] += f(i + l);
    for (int l = 0; i < n; ++i, ++l) lane[l] += f(i);
  }
  QPEFT_INLINE float value() const {
    float sum = 0;
    for (const float part : lane) sum += part;
    return sum;
  }
};

template <typename T>
QPEFT_INLINE inline void rms_norm_rows(const T* x, int64_t stride, const T* weight, float eps, int64_t begin,
                                       int64_t end, int64_t D, T* out, float* scale) {
  float rows[kBlock], weights[kBlock], outs[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const T* row = x + n * stride;
    T* to = out + n * D;
    Sum squares;
    for_blocks(D, [&](int64_t d, int64_t count) QPEFT_INLINE {
      const float* v = widened(row + d, count, rows);
      squares.add(count, [&](int64_t i) QPEFT_INLINE { return v[i] * v[i]; });
    });
    const float factor = 1.0f / std::sqrt(squares.value() / static_cast<float>(D) + eps);
    scale[n] = factor;
    for_blocks(D, [&](int64_t d, int64_t count) QPEFT_INLINE {
      const float *v = widened(row + d, count, rows), *w = widened(weight + d, count, weights);
      float* result = place_for(to + d, outs);
      for (int64_t i = 0; i < count; ++i) result[i] = v[i] * factor;
      round_as<T>(result, count);
      for (int64_t i = 0; i < count; ++i) result[i] *= w[i];
      narrow(result, count, to + d);
    });
  }
}

template <typename T>
QPEFT_INLINE inline void rms_norm_rows_backward(const T* grad, const T* x, int64_t stride, const T* weight,
                                                const float* scale, int64_t begin, int64_t end, int64_t D, T* grad_x) {
  float grads[kBlock], rows[kBlock], weights[kBlock], outs[kBlock];
  for (int64_t n = begin; n < end; ++n) {
    const T *row = x + n * stride, *of_out = grad + n * D;
    T* to = grad_x + n * D;
    Sum products;
    for_blocks(D, [&](int64_t d, int64_t count) QPEFT_INLINE {
      const float *g = widened(of_out + d, count, grads), *v = widened(row + d, count, rows);
      const float* w = widened(weight + d, count, weights);
      products.add(count, [&](int64_t i) QPEFT_INLINE { return g[i] * w[i] * v[i]; });
    });
    const float s = scale[n], along_x = s * s * s * products.value() / static_cast<float>(D);
    for_blocks(D, [&](int64_t d, int64_t count) QPEFT_INLINE {
      const float *g = widened(of_out + d, count, grads), *v = widened(row + d, count, rows);
      const float* w = widened(weight + d, count, weights);
      float* result = place_for(to + d, outs);
      for (int64_t i = 0; i < count; ++i) result[i] = g[i] * w[i] * s - along_x * v[i];
      narrow(result, count, to + d);
    });
  }
}

// ---- silu(gate) * up ----------------------------------------------------------------------------------------------------

QPEFT_INLINE inline float sigmoid(float x) { return 1.0f / (1.0f + vector_exp(-x)); }

template <typename T>
QPEFT_INLINE inline void gated_silu_rows(const T* gate, const T* up, int64_t begin, int64_t end, int64_t D, T* out) {
  float gates[kBlock], ups[kBlock], outs[kBlock];
  for (int64_t row = begin * D; row < end * D; row += D)
    for_blocks(D, [&](int64_t d, int64_t n) QPEFT_INLINE {
      const float *g = widened(gate + row + d, n, gates), *u = widened(up + row + d, n, ups);
      float* to = place_for(out + row + d, outs);
      if constexpr (std::is_same_v<T, float>) {
        for (int64_t i = 0; i < n; ++i) to[i] = g[i] * sigmoid(g[i]) * u[i];
      } else {
        for (int64_t i = 0; i < n; ++i) to[i] = g[i] * sigmoid(g[i]);
        round_as<T>(to, n);
        for (int64_t i = 0; i < n; ++i) to[i] *= u[i];
      }
      narrow(to, n, out + row + d);
    });
}

template <typename T>
QPEFT_INLINE inline void gated_silu_rows_backward(const T* grad, const T* gate, const T* up, int64_t begin, int64_t end,
                                                  int64_t D, T* grad_gate, T* grad_up) {
  float grads[kBlock], gates[kBlock], ups[kBlock], of_gates[kBlock], of_ups[kBlock];
  for (int64_t row = begin * D; row < end * D; row += D)
    for_blocks(D, [&](int64_t d, int64_t n) QPEFT_INLINE {
      const int64_t at = row + d;
      const float *of_out = widened(grad + at, n, grads), *g = widened(gate + at, n, gates);
      const float* u = widened(up + at, n, ups);
      float *of_gate = place_for(grad_gate + at, of_gates), *of_up = place_for(grad_up + at, of_ups);
      for (int64_t i = 0; i < n; ++i) {
        const float s = sigmoid(g[i]);
        of_gate[i] = of_out[i] * u[i] * s * (1.0f + g[i] * (1.0f - s));
        of_up[i] = of_out[i] * g[i] * s;
      }
      narrow(of_gate, n, grad_gate + at);
      narrow(of_up, n, grad_up + at);
    });
}

// ---- rotary embedding -----------------------------------------------------------------------------------------------------

// Parts of the two halves of a vector: up to kBlock numbers of each
template <typename T>
struct Halves {
  float buffers[2][kBlock];
  const float *a, *b;
  QPEFT_INLINE Halves(const T* x, int64_t half, int64_t n)
      : a(widened(x, n, buffers[0])), b(widened(x + half, n, buffers[1])) {}
};

template <typename T>
QPEFT_INLINE inline void rotate_vector(const T* x, const T* cos, const T* sin, int64_t half, bool inverse, T* out) {
  float outs[2][kBlock], others[2][kBlock];
  for_blocks(half, [&](int64_t d, int64_t n) QPEFT_INLINE {
    const Halves<T> v(x + d, half, n), c(cos + d, half, n), s(sin + d, half, n);
    float *to_a = place_for(out + d, outs[0]), *to_b = place_for(out + half + d, outs[1]);
    if (std::is_same_v<T, float> || inverse) {
      const float sign = inverse ? -1.0f : 1.0f, *of_b = inverse ? s.b : s.a, *of_a = inverse ? s.a : s.b;
#pragma GCC ivdep  // too many pointers for the compiler to check that results lie apart from the rest
      for (int64_t i = 0; i < n; ++i) {
        const float a = v.a[i], b = v.b[i];
        to_a[i] = a * c.a[i] - sign * (b * of_b[i]), to_b[i] = b * c.b[i] + sign * (a * of_a[i]);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) {
        to_a[i] = v.a[i] * c.a[i], others[0][i] = v.b[i] * s.a[i];
        to_b[i] = v.b[i] * c.b[i], others[1][i] = v.a[i] * s.b[i];
      }
      for (float* part : {to_a, to_b, others[0], others[1]}) round_as<T>(part, n);
      for (int64_t i = 0; i < n; ++i) to_a[i] -= others[0][i], to_b[i] += others[1][i];
    }
    narrow(to_a, n, out + d);
    narrow(to_b, n, out + half + d);
  });
}

template <typename T>
QPEFT_INLINE inline void rotary_tokens(const T* x, HeadStrides from, const T* cos, const T* sin, int64_t H,
                                       int64_t begin, int64_t end, int64_t D, bool inverse, T* out, HeadStrides to) {
  for (int64_t h = 0; h < H; ++h)
    for (int64_t l = begin; l < end; ++l)
      rotate_vector(x + h * from.head + l * from.token, cos + l * D, sin + l * D, D / 2, inverse,
                    out + h * to.head + l * to.token);
}

}  // namespace
}  // namespace qpeft
