// The products of bfloat16_products.h with tiles: TDPBF16PS adds the product of a [16, 32] and a [32, 16] tile to one of
// 16 by 16 sums. Four of the eight tiles hold sums, so that a step reads as many tiles as it multiplies.
#include "cpu/amx_tiles.h"
#include "cpu/bfloat16_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kStep = 16;  // pairs that are multiplied at a time
constexpr int64_t kWords = 2 * kTile;
constexpr int64_t kWordBytes = 1 << 20;  // of packed words that stay in the second cache for all rows
constexpr int64_t kTilePairs = 640;  // of words, packed at a time
constexpr int64_t kTilesOfB = 4;

// n rows of 2 * pairs numbers as tiles: packed[step][row of kRows][pair of kStep], zeros after the last row and pair.
template <int kRows>
void pack_rows(const uint16_t* x, int64_t stride, int64_t n, int64_t numbers, uint16_t* packed) {
  for (int64_t at = 0; at < numbers; at += 2 * kStep) {
    const int64_t some = std::min(2 * kStep, numbers - at);
    const __mmask32 mask = some == 2 * kStep ? ~0u : (1u << some) - 1;
    for (int64_t r = 0; r < kRows; ++r, packed += 2 * kStep)
      _mm512_store_si512(packed, r < n ? _mm512_maskz_loadu_epi16(mask, x + r * stride + at) : _mm512_setzero_si512());
  }
}

// The sums of 16 words and 16 rows, of which n_words and n_rows count, to out[row, word].
void store_tile(const float* sums, float* out, int64_t stride, int64_t n_rows, int64_t n_words) {
  __m512i x[16];
  for (int64_t c = 0; c < kTile; ++c) x[c] = _mm512_load_si512(sums + c * kVector);
  transpose(x);
  for (int64_t r = 0; r < std::min(kVector, n_rows); ++r)
    _mm512_mask_storeu_epi32(out + r * stride, lanes(n_words), x[r]);
}

// 32 words by one or two vectors of 16 rows
template <int kVectors>
void products(const uint32_t* rows, int64_t packed_pairs, const uint16_t* words, int64_t n_rows, int64_t n_words,
              float* out, int64_t out_stride) {
  alignas(64) float sums[4][kTile * kVector];
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kVectors == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t pair = 0; pair < packed_pairs; pair += kStep, words += kWords * 2 * kStep) {
    _tile_loadd(4, words, kLine);
    _tile_loadd(5, words + kTile * 2 * kStep, kLine);
    _tile_loadd(6, rows + pair * kVector, kLine);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kVectors == 2) {
      _tile_loadd(7, rows + (packed_pairs + pair) * kVector, kLine);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  if constexpr (kVectors == 2) {
    _tile_stored(2, sums[2], kLine);
    _tile_stored(3, sums[3], kLine);
  }
  for (int v = 0; v < kVectors; ++v)
    for (int half = 0; half < 2; ++half)
      store_tile(sums[2 * v + half], out + v * kVector * out_stride + half * kTile, out_stride, n_rows - v * kVector,
                 n_words - half * kTile);
}

void products_of_words(const uint32_t* packed, int64_t N, int64_t pairs, const uint16_t* b, int64_t b_stride,
                       int64_t begin, int64_t end, float* out, int64_t out_stride) {
  const Tiles tiles;
  const int64_t packed_pairs = round_up(pairs, kStep), of_words = kWords * 2 * packed_pairs;  // numbers
  const int64_t groups =
      std::clamp<int64_t>(kWordBytes / (2 * std::max<int64_t>(of_words, 1)), 1, (end - begin + kWords - 1) / kWords);
  const auto words = aligned<uint16_t>(groups * of_words);
  for (int64_t first = begin; first < end; first += groups * kWords) {  // words that are read once for all rows
    const int64_t last = std::min(first + groups * kWords, end);
    for (int64_t c = first; c < last; c += kWords)
      pack_rows<kWords>(b + c * b_stride, b_stride, last - c, 2 * pairs, words.get() + (c - first) / kWords * of_words);
    for (int64_t n = 0; n < N; n += 2 * kVector) {
      const auto some = N - n > kVector ? products<2> : products<1>;
      for (int64_t c = first; c < last; c += kWords)
        some(packed + n * packed_pairs, packed_pairs, words.get() + (c - first) / kWords * of_words, N - n, last - c,
             out + n * out_stride + c, out_stride);
    }
  }
}

// 16 rows by 64 columns; a_step: bytes from the numbers of a step to those of the next
void add_tiles(const uint16_t* a, int64_t a_line, int64_t a_step, int64_t steps, const uint32_t* b, float* total,
               int64_t total_line) {
  constexpr int64_t kColumnBytes = kColumns * sizeof(float);
  _tile_loadd(0, total, total_line);
  _tile_loadd(1, total + kVector, total_line);
  _tile_loadd(2, total + 2 * kVector, total_line);
  _tile_loadd(3, total + 3 * kVector, total_line);
  for (int64_t step = 0; step < steps; ++step, b += kStep * kColumns) {
    _tile_loadd(4, reinterpret_cast<const char*>(a) + step * a_step, a_line);
    _tile_loadd(5, b, kColumnBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + kVector, kColumnBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 2 * kVector, kColumnBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 3 * kVector, kColumnBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, total, total_line);
  _tile_stored(1, total + kVector, total_line);
  _tile_stored(2, total + 2 * kVector, total_line);
  _tile_stored(3, total + 3 * kVector, total_line);
}

void copy_columns(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t n_rows,
                  const ColumnMasks& mask) {
  for (int64_t r = 0; r < n_rows; ++r)
    for (int v = 0; v < 4; ++v)
      _mm512_mask_storeu_ps(to + r * to_stride + v * kVector, mask.of[v],
                            _mm512_maskz_loadu_ps(mask.of[v], from + r * from_stride + v * kVector));
}

void add_product_of_columns(const uint16_t* a, int64_t a_stride, int64_t begin, int64_t end, int64_t C,
                            const uint16_t* b, int64_t b_stride, int64_t n_columns, float* total,
                            int64_t total_stride) {
  const Tiles tiles;
  constexpr int64_t kPacked = kTilePairs * kColumns;
  const auto packed = aligned<uint32_t>(kTilesOfB * kPacked);
  const auto some_rows = aligned<uint16_t>(kTile * 2 * kTilePairs);
  alignas(64) float some_sums[kTile * kColumns] = {};
  for (int64_t c = 0; c < C; c += 2 * kTilePairs) {
    const int64_t n = std::min(2 * kTilePairs, C - c), pairs = (n + 1) / 2, steps = (pairs + kStep - 1) / kStep;
    for (int64_t d = 0; d < n_columns; d += kColumns) {
      uint32_t* tile = packed.get() + d / kColumns * kPacked;
      pack_pairs(b + c * b_stride + d, b_stride, n, ColumnMasks(n_columns - d), tile);
      std::fill(tile + pairs * kColumns, tile + steps * kStep * kColumns, 0u);
    }
    for (int64_t r = begin; r < end; r += kTile) {
      const int64_t n_rows = std::min(kTile, end - r);
      const uint16_t* rows = a + r * a_stride + c;
      int64_t line = 2 * a_stride, step = kLine;
      if (n_rows < kTile || n % (2 * kStep)) {
        pack_rows<kTile>(rows, a_stride, n_rows, n, some_rows.get());
        rows = some_rows.get(), line = kLine, step = kTile * kLine;
      }
      for (int64_t d = 0; d < n_columns; d += kColumns) {
        const uint32_t* tile = packed.get() + d / kColumns * kPacked;
        float* sums = total + r * total_stride + d;
        if (n_rows == kTile && n_columns - d >= kColumns) {
          add_tiles(rows, line, step, steps, tile, sums, total_stride * sizeof(float));
          continue;
        }
        const ColumnMasks mask(n_columns - d);
        copy_columns(sums, total_stride, some_sums, kColumns, n_rows, mask);
        add_tiles(rows, line, step, steps, tile, some_sums, kColumns * sizeof(float));
        copy_columns(some_sums, kColumns, sums, total_stride, n_rows, mask);
      }
    }
  }
}

}  // namespace

const BFloat16Kernels kAmxKernels = {kWords, kStep,     pack_vector,           products_of_words,
                                     2048,   kTilesOfB, add_product_of_columns};

}  // namespace qpeft
