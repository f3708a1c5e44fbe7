// The kernels of int8_linear.h with tiles: TDPBUSD adds the product of a [16, 64] and a [64, 16] tile to one of 16 by 16 sums.
// Four of the eight tiles hold sums, so that a step reads as many tiles as it multiplies.
#include <algorithm>

#include "cpu/amx_tiles.h"
#include "cpu/int8_vectors.h"

namespace qpeft {
namespace {

constexpr int64_t kStep = 64;  // inputs that are multiplied at a time
constexpr int64_t kRows = 2 * kTile;
static_assert(kRows <= kInt8Padding && kTile == kInt8Words);

// Up to kRows rows by one or two blocks of outputs
template <int kBlocks>
void multiply_rows(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c,
                   const Outputs (&outputs)[kBlocks], float* out) {
  alignas(64) int32_t sums[4][kTile * kInt8Words];
  const int64_t D = layer.D;
  const uint8_t* bytes = rows.bytes;
  const int8_t* weight = layer.weight + c * D;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < D; d += kStep) {
    _tile_loadd(4, bytes + d, D);
    _tile_loadd(6, weight + d * kInt8Words, kLine);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(5, bytes + kTile * D + d, D);
    _tile_dpbusd(1, 5, 6);
    if constexpr (kBlocks == 2) {
      _tile_loadd(7, weight + (D + d) * kInt8Words, kLine);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  if constexpr (kBlocks == 2) {
    _tile_stored(2, sums[2], kLine);
    _tile_stored(3, sums[3], kLine);
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int64_t r = 0; r < std::min(n, kRows); ++r)
      outputs[b].store(_mm512_load_si512(sums[2 * b + r / kTile] + r % kTile * kInt8Words), rows, r,
                       out + b * kInt8Words);
}

void multiply(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c, int64_t words, float* out) {
  const Tiles tiles;
  multiply_blocks<kRows>(rows, n, layer, c, words, out,
                         [&](const Int8Rows& some, int64_t left, const auto& outputs, float* to) {
                           multiply_rows(some, left, layer, c, outputs, to);
                         });
}

}  // namespace

const Int8Kernels kInt8AmxKernels = {quantize_rows, multiply};

}  // namespace qpeft
