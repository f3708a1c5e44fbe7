// The kernels of bfloat16_attention.h with tiles of AMX. A head is worked on as a whole: its keys and values are packed once,
// then 16 rows of queries at a time have all their scores in the second cache, float32 between the products.
#include "cpu/bfloat16_attention.h"

#include <bit>
#include <cmath>
#include <limits>

#include "cpu/amx_tiles.h"
#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kWords = 32;  // bfloat16 of the row of a tile: what a step multiplies
constexpr int64_t kBackRows = 64;  // rows of queries that a backward pass has in work
constexpr float kLog2E = 1.44269504f, kInfinity = std::numeric_limits<float>::infinity();

// Packed matrices b [2 * pairs, columns]: blocks of 16 columns, in each of them the pairs of rows one after the other.

// b = the transpose of x [n, D], its columns filled up with zeros to a multiple of 32
void pack_transposed(const uint16_t* x, int64_t stride, int64_t n, int64_t D, uint32_t* packed) {
  for (int64_t r = 0; r < round_up(n, kWords); r += kTile, packed += D / 2 * kVector)
    pack_vector(x + r * stride, stride, n - r, D / 2, D / 2, packed);
}

// b = x [n, D], its rows filled up with zeros to a multiple of 32
void pack_rows(const uint16_t* x, int64_t stride, int64_t n, int64_t D, uint32_t* packed) {
  const int64_t block = round_up(n, kWords) / 2 * kVector;
  alignas(64) uint16_t places[2][kWords];  // of the words of two rows in pairs
  for (int64_t i = 0; i < kWords; ++i)
    for (int64_t half = 0; half < 2; ++half) places[half][i] = kTile * half + i / 2 + i % 2 * kWords;
  const __m512i left = _mm512_load_si512(places[0]), right = _mm512_load_si512(places[1]);
  for (int64_t d = 0; d < D; d += kWords)
    for (int64_t r = 0; r < round_up(n, kWords); r += 2) {
      const __m512i even = r < n ? _mm512_loadu_si512(x + r * stride + d) : _mm512_setzero_si512();
      const __m512i odd = r + 1 < n ? _mm512_loadu_si512(x + (r + 1) * stride + d) : _mm512_setzero_si512();
      uint32_t* to = packed + d / kTile * block + r / 2 * kVector;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, left, odd));
      _mm512_store_si512(to + block, _mm512_permutex2var_epi16(even, right, odd));
    }
}

// 16 rows of a, the words of a step a_step after those of the step before
struct Rows {
  const uint16_t* at;
  int64_t line, step, steps;  // bytes, words, count
};

template <int kBlocks>
void product_of_blocks(const Rows& a, const uint32_t* b, int64_t block, bool add, float* out, int64_t out_line) {
  if (add) {
    _tile_loadd(0, out, out_line);
    if constexpr (kBlocks > 1) _tile_loadd(1, out + kVector, out_line);
    if constexpr (kBlocks > 2) _tile_loadd(2, out + 2 * kVector, out_line);
    if constexpr (kBlocks > 3) _tile_loadd(3, out + 3 * kVector, out_line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < a.steps; ++step, b += kTile * kVector) {
    _tile_loadd(4, a.at + step * a.step, a.line);
    _tile_loadd(5, b, kLine);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kBlocks > 1) {
      _tile_loadd(6, b + block, kLine);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (kBlocks > 2) {
      _tile_loadd(7, b + 2 * block, kLine);
      _tile_dpbf16ps(2, 4, 7);
    }
    if constexpr (kBlocks > 3) {
      _tile_loadd(5, b + 3 * block, kLine);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, out, out_line);
  if constexpr (kBlocks > 1) _tile_stored(1, out + kVector, out_line);
  if constexpr (kBlocks > 2) _tile_stored(2, out + 2 * kVector, out_line);
  if constexpr (kBlocks > 3) _tile_stored(3, out + 3 * kVector, out_line);
}

// out [16, columns] = a b, or += where add
void product(const Rows& a, const uint32_t* b, int64_t pairs, int64_t columns, float* out, int64_t out_stride,
             bool add = false) {
  const int64_t block = pairs * kVector, line = out_stride * sizeof(float);
  for (int64_t c = 0; c < columns; c += 4 * kVector) {
    const int64_t blocks = std::min<int64_t>(4, (columns - c) / kVector);
    const auto some = blocks == 4   ? product_of_blocks<4>
                      : blocks == 3 ? product_of_blocks<3>
                      : blocks == 2 ? product_of_blocks<2>
                                    : product_of_blocks<1>;
    some(a, b + c / kVector * block, block, add, out + c, line);
  }
}

Rows rows_of(const uint16_t* a, int64_t width) { return {a, 2 * width, kWords, width / kWords}; }

// 2^x, relative error 2e-7 (the polynomial of Cephes); 0 below -126, since denormal results take hundreds of cycles. A NaN
// stays one.
__m512 power_of_two(__m512 x) {
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

__mmask16 allowed(const bool* mask, int64_t t, int64_t T) {
  const __m128i some = _mm_maskz_loadu_epi8(lanes(T - t), mask + t);
  return _mm_test_epi8_mask(some, some);
}

__m512i rounded(__m512 first, __m512 second) {
  return std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));  // 32 bfloat16, to nearest
}

void store_rounded(const float* x, int64_t n, float factor, uint16_t* to) {  // n a multiple of 32
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < n; i += kWords)
    _mm512_storeu_si512(to + i, rounded(_mm512_mul_ps(_mm512_loadu_ps(x + i), by),
                                        _mm512_mul_ps(_mm512_loadu_ps(x + i + kVector), by)));
}

struct RowSum {
  float top, sum;  // the largest score, in powers of two, and the sum of 2^(score - top)
};

// scores [columns] of a row -> 2^(scale * score - top) as bfloat16; columns is T, filled up to a multiple of 32
RowSum softmax(float* scores, const bool* mask, int64_t T, int64_t columns, float scale, uint16_t* weights) {
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
void softmax_backward(float* scores, float* grads, const bool* mask, int64_t T, int64_t columns, float scale, float lse,
                      float mean, uint16_t* rounded_grads) {
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

// Columns of x [32 * steps, 16] as rows of a product: out[step][column][32 rows]
void transpose_rounded(const float* x, int64_t stride, int64_t steps, uint16_t* out) {
  alignas(64) uint16_t places[kWords];
  for (int64_t i = 0; i < kWords; ++i) places[i] = i / 2 + i % 2 * kTile;
  const __m512i pairs = _mm512_load_si512(places);
  for (int64_t step = 0; step < steps; ++step, x += kWords * stride, out += kTile * kWords) {
    __m512i rows[16];
    for (int64_t i = 0; i < kTile; ++i) {
      const float* at = x + 2 * i * stride;
      rows[i] = _mm512_permutexvar_epi16(pairs, rounded(_mm512_loadu_ps(at), _mm512_loadu_ps(at + stride)));
    }
    transpose(rows);
    for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(out + i * kWords, rows[i]);
  }
}

float product_of(const uint16_t* a, const uint16_t* b, int64_t n) {  // n a multiple of 32
  __m512 sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += kVector) {
    const auto wide = [i](const uint16_t* x) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    };
    sum = _mm512_fmadd_ps(wide(a), wide(b), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <typename T>
T* row(const HeadRows<T>& rows, int64_t r, int64_t L) {
  return rows.at + r / L * rows.head + r % L * rows.row;
}

// Rows begin .. begin + n of all heads one after the other, filled up with zeros to `filled` rows.
void copy_rows(const HeadRows<const uint16_t>& rows, int64_t begin, int64_t n, int64_t filled, int64_t L, int64_t D,
               uint16_t* to) {
  for (int64_t r = 0; r < n; ++r) std::copy_n(row(rows, begin + r, L), D, to + r * D);
  std::fill(to + n * D, to + filled * D, uint16_t(0));
}

}  // namespace

struct AttentionMemory {
  using Words = std::unique_ptr<uint16_t[], Free>;
  using Pairs = std::unique_ptr<uint32_t[], Free>;
  using Sums = std::unique_ptr<float[], Free>;
  Pairs key_transposed, value_transposed, key_rows, value_rows, query_rows, grad_rows;
  Words query, grad, weights, transposed;
  Sums scores, grads, of_key, of_value, of_rows;

  AttentionMemory(int64_t T, int64_t D, bool backward) {
    const int64_t columns = round_up(T, kWords), rows = backward ? kBackRows : kTile;
    key_transposed = aligned<uint32_t>(columns * D / 2);
    query = aligned<uint16_t>(rows * D);
    scores = aligned<float>(rows * columns);
    of_rows = aligned<float>(kTile * D);
    weights = aligned<uint16_t>(kTile * columns);
    if (!backward) {
      value_rows = aligned<uint32_t>(columns * D / 2);
      return;
    }
    value_transposed = aligned<uint32_t>(columns * D / 2);
    key_rows = aligned<uint32_t>(columns * D / 2);
    query_rows = aligned<uint32_t>(rows * D / 2);
    grad_rows = aligned<uint32_t>(rows * D / 2);
    grad = aligned<uint16_t>(rows * D);
    transposed = aligned<uint16_t>(kTile * rows);
    grads = aligned<float>(rows * columns);
    of_key = aligned<float>(columns * D);
    of_value = aligned<float>(columns * D);
  }
};

AttentionMemory* new_attention_memory(const AttentionHead& head, bool backward) {
  return new AttentionMemory(head.T, head.D, backward);
}

void delete_attention_memory(AttentionMemory* memory) { delete memory; }

void attend(const AttentionHead& x, int64_t first, int64_t last, AttentionMemory& m, const HeadRows<uint16_t>& out,
            float* lse) {
  const Tiles tiles;
  const int64_t columns = round_up(x.T, kWords), D = x.D;
  pack_transposed(x.key, x.key_row, x.T, D, m.key_transposed.get());
  pack_rows(x.value, x.value_row, x.T, D, m.value_rows.get());
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = std::min(kTile, last - begin);
    copy_rows(x.query, begin, n, kTile, x.L, D, m.query.get());
    product(rows_of(m.query.get(), D), m.key_transposed.get(), D / 2, columns, m.scores.get(), columns);
    float factors[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
      if (r >= n) {
        std::fill_n(m.weights.get() + r * columns, columns, uint16_t(0));
        continue;
      }
      const RowSum found = softmax(m.scores.get() + r * columns, x.mask + (begin + r) % x.L * x.mask_row, x.T, columns,
                                   x.scale * kLog2E, m.weights.get() + r * columns);
      const bool none = found.top == -kInfinity;
      factors[r] = none ? 0.0f : 1.0f / found.sum;
      lse[begin + r] = none ? 0.0f : found.top / kLog2E + std::log(found.sum);
    }
    product(rows_of(m.weights.get(), columns), m.value_rows.get(), columns / 2, D, m.of_rows.get(), D);
    for (int64_t r = 0; r < n; ++r) store_rounded(m.of_rows.get() + r * D, D, factors[r], row(out, begin + r, x.L));
  }
}

void attend_backward(const AttentionHead& x, AttentionMemory& m, const HeadRows<const uint16_t>& out, const float* lse,
                     const HeadRows<const uint16_t>& grad, const HeadRows<uint16_t>& grad_query, uint16_t* grad_key,
                     uint16_t* grad_value) {
  const Tiles tiles;
  const int64_t columns = round_up(x.T, kWords), all = x.heads * x.L, D = x.D;
  pack_transposed(x.key, x.key_row, x.T, D, m.key_transposed.get());
  pack_transposed(x.value, x.value_row, x.T, D, m.value_transposed.get());
  pack_rows(x.key, x.key_row, x.T, D, m.key_rows.get());
  std::fill_n(m.of_key.get(), columns * D, 0.0f);
  std::fill_n(m.of_value.get(), columns * D, 0.0f);
  for (int64_t begin = 0; begin < all; begin += kBackRows) {
    const int64_t n = std::min(kBackRows, all - begin), filled = round_up(n, kWords), steps = filled / kWords;
    copy_rows(x.query, begin, n, filled, x.L, D, m.query.get());
    copy_rows(grad, begin, n, filled, x.L, D, m.grad.get());
    pack_rows(m.query.get(), D, n, D, m.query_rows.get());
    pack_rows(m.grad.get(), D, n, D, m.grad_rows.get());
    for (int64_t first = 0; first < filled; first += kTile) {
      float *scores = m.scores.get() + first * columns, *grads = m.grads.get() + first * columns;
      product(rows_of(m.query.get() + first * D, D), m.key_transposed.get(), D / 2, columns, scores, columns);
      product(rows_of(m.grad.get() + first * D, D), m.value_transposed.get(), D / 2, columns, grads, columns);
      for (int64_t r = 0; r < kTile; ++r) {
        uint16_t* rounded_grads = m.weights.get() + r * columns;
        if (first + r >= n) {
          std::fill_n(scores + r * columns, columns, 0.0f);
          std::fill_n(grads + r * columns, columns, 0.0f);
          std::fill_n(rounded_grads, columns, uint16_t(0));
          continue;
        }
        const int64_t at = begin + first + r;
        softmax_backward(scores + r * columns, grads + r * columns, x.mask + at % x.L * x.mask_row, x.T, columns,
                         x.scale, lse[at], product_of(row(out, at, x.L), row(grad, at, x.L), D), rounded_grads);
      }
      product(rows_of(m.weights.get(), columns), m.key_rows.get(), columns / 2, D, m.of_rows.get(), D);
      for (int64_t r = 0; r < std::min(kTile, n - first); ++r)
        store_rounded(m.of_rows.get() + r * D, D, 1.0f, row(grad_query, begin + first + r, x.L));
    }
    const Rows some = {m.transposed.get(), kLine, kTile * kWords, steps};
    for (int64_t t = 0; t < columns; t += kTile) {
      transpose_rounded(m.scores.get() + t, columns, steps, m.transposed.get());
      product(some, m.grad_rows.get(), filled / 2, D, m.of_value.get() + t * D, D, true);
      transpose_rounded(m.grads.get() + t, columns, steps, m.transposed.get());
      product(some, m.query_rows.get(), filled / 2, D, m.of_key.get() + t * D, D, true);
    }
  }
  store_rounded(m.of_key.get(), x.T * D, 1.0f, grad_key);
  store_rounded(m.of_value.get(), x.T * D, 1.0f, grad_value);
}

}  // namespace qpeft
