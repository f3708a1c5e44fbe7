// The kernels of bfloat16_attention.h with tiles of AMX. A head is worked on as a whole: its keys and values are packed once,
// then 16 rows of queries at a time have all their scores in the second cache, float32 between the products. Only the keys from
// the first to the last that some row sees are looked at: half of them in causal attention, and none of the padding.
#include "cpu/bfloat16_attention.h"

#include <bit>
#include <cmath>
#include <utility>

#include "cpu/amx_tiles.h"
#include "cpu/bfloat16_softmax.h"
#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kBackRows = 64;  // rows of queries that a backward pass has in work

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

// The first `width` words of 16 rows
Rows rows_of(const uint16_t* a, int64_t width) { return {a, 2 * width, kWords, width / kWords}; }

struct Span {
  int64_t begin, end;
  int64_t columns() const { return round_up(end - begin, kWords); }
};

// From the first key that the mask of one of `rows` rows of all heads leaves, down to a multiple of 32, to the last. Of
// rows that see none: one
Span keys_seen(const AttentionHead& x, int64_t row, int64_t rows) {
  int64_t begin = x.T, end = 0;
  for (int64_t r = row; r < row + std::min(rows, x.L); ++r) {
    const bool* mask = x.mask + r % x.L * x.mask_row;
    const auto seen = [&](int64_t t) {
      const __mmask64 there = x.T - t < kLine ? (uint64_t{1} << (x.T - t)) - 1 : ~uint64_t{0};
      const __m512i some = _mm512_maskz_loadu_epi8(there, mask + t);
      return uint64_t{_mm512_test_epi8_mask(some, some)};
    };
    for (int64_t t = 0; t < begin; t += kLine)
      if (const uint64_t found = seen(t)) begin = std::min(begin, t + std::countr_zero(found));
    for (int64_t t = (x.T - 1) / kLine * kLine; t + kLine > end && t >= 0; t -= kLine)
      if (const uint64_t found = seen(t)) end = std::max<int64_t>(end, t + std::bit_width(found));
  }
  return begin < end ? Span{begin / kWords * kWords, end} : Span{0, std::min<int64_t>(1, x.T)};
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
  const Span all = keys_seen(x, first, last - first);
  const int64_t D = x.D, pairs = all.columns() / 2;
  pack_transposed(x.key + all.begin * x.key_row, x.key_row, all.end - all.begin, D, m.key_transposed.get());
  pack_rows(x.value + all.begin * x.value_row, x.value_row, all.end - all.begin, D, m.value_rows.get());
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = std::min(kTile, last - begin);
    const Span seen = keys_seen(x, begin, n);
    const int64_t columns = seen.columns(), skipped = std::max<int64_t>(seen.begin - all.begin, 0);
    copy_rows(x.query, begin, n, kTile, x.L, D, m.query.get());
    product(rows_of(m.query.get(), D), m.key_transposed.get() + skipped * D / 2, D / 2, columns, m.scores.get(),
            columns);
    float factors[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
      if (r >= n) {
        std::fill_n(m.weights.get() + r * columns, columns, uint16_t(0));
        continue;
      }
      const bool* mask = x.mask + (begin + r) % x.L * x.mask_row + seen.begin;
      const RowSum found = softmax(m.scores.get() + r * columns, mask, seen.end - seen.begin, columns, x.scale * kLog2E,
                                   m.weights.get() + r * columns);
      const bool none = found.top == -kInfinity;
      factors[r] = none ? 0.0f : 1.0f / found.sum;
      lse[begin + r] = none ? 0.0f : found.top / kLog2E + std::log(found.sum);
    }
    product(rows_of(m.weights.get(), columns), m.value_rows.get() + skipped / 2 * kVector, pairs, D, m.of_rows.get(),
            D);
    for (int64_t r = 0; r < n; ++r) store_rounded(m.of_rows.get() + r * D, D, factors[r], row(out, begin + r, x.L));
  }
}

void attend_backward(const AttentionHead& x, AttentionMemory& m, const HeadRows<const uint16_t>& out, const float* lse,
                     const HeadRows<const uint16_t>& grad, const HeadRows<uint16_t>& grad_query, uint16_t* grad_key,
                     uint16_t* grad_value) {
  const Tiles tiles;
  const Span all = keys_seen(x, 0, x.L);
  const int64_t T = all.end - all.begin, rows = x.heads * x.L, D = x.D;
  const uint16_t *keys = x.key + all.begin * x.key_row, *values = x.value + all.begin * x.value_row;
  pack_transposed(keys, x.key_row, T, D, m.key_transposed.get());
  pack_transposed(values, x.value_row, T, D, m.value_transposed.get());
  pack_rows(keys, x.key_row, T, D, m.key_rows.get());
  std::fill_n(m.of_key.get(), all.columns() * D, 0.0f);
  std::fill_n(m.of_value.get(), all.columns() * D, 0.0f);
  for (int64_t begin = 0; begin < rows; begin += kBackRows) {
    const int64_t n = std::min(kBackRows, rows - begin), filled = round_up(n, kWords), steps = filled / kWords;
    const Span seen = keys_seen(x, begin, n);
    const int64_t columns = seen.columns(), skipped = std::max<int64_t>(seen.begin - all.begin, 0);
    copy_rows(x.query, begin, n, filled, x.L, D, m.query.get());
    copy_rows(grad, begin, n, filled, x.L, D, m.grad.get());
    pack_rows(m.query.get(), D, n, D, m.query_rows.get());
    pack_rows(m.grad.get(), D, n, D, m.grad_rows.get());
    for (int64_t first = 0; first < filled; first += kTile) {
      float *scores = m.scores.get() + first * columns, *grads = m.grads.get() + first * columns;
      product(rows_of(m.query.get() + first * D, D), m.key_transposed.get() + skipped * D / 2, D / 2, columns, scores,
              columns);
      product(rows_of(m.grad.get() + first * D, D), m.value_transposed.get() + skipped * D / 2, D / 2, columns, grads,
              columns);
      for (int64_t r = 0; r < kTile; ++r) {
        uint16_t* rounded_grads = m.weights.get() + r * columns;
        if (first + r >= n) {
          std::fill_n(scores + r * columns, columns, 0.0f);
          std::fill_n(grads + r * columns, columns, 0.0f);
          std::fill_n(rounded_grads, columns, uint16_t(0));
          continue;
        }
        const int64_t at = begin + first + r;
        softmax_backward(scores + r * columns, grads + r * columns, x.mask + at % x.L * x.mask_row + seen.begin,
                         seen.end - seen.begin, columns, x.scale, lse[at],
                         product_of(row(out, at, x.L), row(grad, at, x.L), D), rounded_grads);
      }
      product(rows_of(m.weights.get(), columns), m.key_rows.get() + skipped / 2 * kVector, all.columns() / 2, D,
              m.of_rows.get(), D);
      for (int64_t r = 0; r < std::min(kTile, n - first); ++r)
        store_rounded(m.of_rows.get() + r * D, D, 1.0f, row(grad_query, begin + first + r, x.L));
    }
    const Rows some = {m.transposed.get(), kLine, kTile * kWords, steps};
    for (int64_t t = 0; t < columns; t += kTile) {
      transpose_rounded(m.scores.get() + t, columns, steps, m.transposed.get());
      product(some, m.grad_rows.get(), filled / 2, D, m.of_value.get() + (skipped + t) * D, D, true);
      transpose_rounded(m.grads.get() + t, columns, steps, m.transposed.get());
      product(some, m.query_rows.get(), filled / 2, D, m.of_key.get() + (skipped + t) * D, D, true);
    }
  }
  for (const auto& [sums, to] : {std::pair{m.of_key.get(), grad_key}, std::pair{m.of_value.get(), grad_value}}) {
    std::fill(to, to + all.begin * D, uint16_t(0));
    store_rounded(sums, T * D, 1.0f, to + all.begin * D);
    std::fill(to + all.end * D, to + x.T * D, uint16_t(0));
  }
}

}  // namespace qpeft
