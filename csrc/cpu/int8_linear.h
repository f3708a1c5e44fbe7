// Linear layers with weights and activations in 8 bits: one set of kernels for each set of instructions; int8_linear.cpp finds
// out which of them this processor may run.
#pragma once
#include <cstdint>

namespace qpeft {

constexpr int64_t kInt8Words = 16;  // outputs of a block of weights
constexpr int64_t kInt8Group = 2 * kInt8Words;  // outputs at a time, where there are as many left
constexpr int64_t kInt8Zero = 128;  // the byte that stands for 0 in activations
constexpr float kInt8Tiny = 1e-36f;  // a row of nothing larger is all zeros: 127 / it could overflow
constexpr int64_t kInt8Turned = 64;  // inputs that are turned together
constexpr int64_t kInt8Padding = 32;  // rows of bytes that may be read after the last one

// A layer, with its weight turned as int8_linear.cpp says: weight [C / 16][D / 4][16 outputs][4 inputs], scale [C], sums [C] of the
// weights of each output, bias [C] or null; and R inputs that are not rounded: their numbers, and their weights exact [R, C].
struct Int8Layer {
  const int8_t* weight;
  const float* scale;
  const int32_t* sums;
  const float* bias;
  const int32_t* columns;
  const float* exact;
  int64_t D, C, R;
};

// What is made of rows of x [N, D], for one product.
struct Int8Rows {
  uint8_t* bytes;  // [N + kInt8Padding, D]
  float* scale;  // [N]
  float* exact;  // [N, R]
  Int8Rows from(int64_t n, const Int8Layer& layer) const {
    return {bytes + n * layer.D, scale + n, exact + n * layer.R};
  }
};

struct Int8Kernels {
  // Rows begin .. end of x: exact[n, i] = x[n, columns[i]], which are 0 in what follows; turned = H x;
  // scale[n] = max |turned| / 127, bytes[n, d] = 128 + round(turned / scale). A row with a number that is not finite has such a scale.
  void (*quantize_rows)(const float* x, int64_t stride, int64_t begin, int64_t end, const Int8Layer& layer,
                        const Int8Rows& rows);
  // Outputs c .. c + words (16 or 32, whole blocks) of n rows: out[r, w] =
  //   row_scale[r] * scale[w] * (sum of bytes[r] * weight[w] - 128 * sums[w]) + sum of exact[r] * exact[., w] + bias[w]
  void (*multiply)(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c, int64_t words, float* out);
};

// What this processor has, best last.
constexpr int64_t kInt8Portable = 0, kInt8Avx512Vnni = 1, kInt8Amx = 2;
extern const Int8Kernels kInt8Avx512VnniKernels, kInt8AmxKernels;

}  // namespace qpeft
