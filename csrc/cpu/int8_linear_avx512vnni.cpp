// The kernels of int8_linear.h with VPDPBUSD: four products and additions for each of 16 sums. 24 sums are in registers; a step
// reads 14 others.
#include <cstring>

#include "cpu/int8_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kRows = 12;
static_assert(kRows <= kInt8Padding);

// kRows rows, of which n count, by kBlocks blocks of outputs
template <int kBlocks>
void multiply_rows(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c,
                   const Outputs (&outputs)[kBlocks], float* out) {
  const int64_t D = layer.D, block = kInt8Words * D;
  const int8_t* weight = layer.weight + c * D;
  __m512i sums[kRows][kBlocks];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) sums[r][b] = _mm512_setzero_si512();
  for (int64_t d = 0; d < D; d += 4) {
    __m512i weights[kBlocks];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) weights[b] = _mm512_loadu_si512(weight + b * block + d * kInt8Words);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int32_t four;
      std::memcpy(&four, rows.bytes + r * D + d, 4);
      const __m512i row = _mm512_set1_epi32(four);
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) sums[r][b] = _mm512_dpbusd_epi32(sums[r][b], row, weights[b]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)  // unrolled, like the others: only then are all sums in registers
    if (r < n)
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) outputs[b].store(sums[r][b], rows, r, out + b * kInt8Words);
}

void multiply(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c, int64_t words, float* out) {
  multiply_blocks<kRows>(rows, n, layer, c, words, out,
                         [&](const Int8Rows& some, int64_t left, const auto& outputs, float* to) {
                           multiply_rows(some, left, layer, c, outputs, to);
                         });
}

}  // namespace

const Int8Kernels kInt8Avx512VnniKernels = {quantize_rows, multiply};

}  // namespace qpeft
