// Dispatch, threads and vectorisable scalar functions of the CPU kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <new>

#include "dispatch.h"
#include "math.h"

namespace qpeft {

// f(begin, end) over [0, n) on torch's threads; at least `grain` units each. f may only throw std::bad_alloc. That does not leave
// its thread: on the way through torch it would lose its words, from which callers know that they may try again with less.
template <typename F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  std::atomic<bool> enough{true};
  const auto guarded = [&](int64_t begin, int64_t end) {
    try {
      f(begin, end);
    } catch (const std::bad_alloc&) {
      enough = false;
    }
  };
  torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), guarded);
  STD_TORCH_CHECK(enough, "not enough memory for what a thread of a kernel needs");
}

// The bfloat16 numbers of a tensor, as bits.
inline const uint16_t* words_of(const Tensor& x) { return const_data<uint16_t>(x); }

// Loops of plain code take a third of the time with the processor's widest vectors. Only functions that call nothing but inlined
// code (QPEFT_INLINE where the compiler might not) may have clones: what they call is compiled once, for every processor.
#if defined(__x86_64__) && defined(__gnu_linux__)
#define QPEFT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define QPEFT_CLONES
#endif
#define QPEFT_INLINE __attribute__((always_inline))

// exp for loops that the compiler is to vectorise (a call to std::exp ends that). Relative error 2e-7; 0 below -87.3.
QPEFT_INLINE inline float vector_exp(float x) {
  constexpr float kLow = -87.3f, kHigh = 88.7f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = std::min(std::max(x, kLow), kHigh);            // in this order a NaN stays one
  const float shifted = clamped * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: Cephes
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x < kLow ? 0.0f : p * power;
}
inline double vector_exp(double x) { return std::exp(x); }

// tanh with an absolute error of 1e-7, for the same purpose.
inline float vector_tanh(float x) {
  const float e = vector_exp(-2.0f * std::fabs(x));
  return std::copysign((1.0f - e) / (1.0f + e), x);
}
inline double vector_tanh(double x) { return std::tanh(x); }

// The same with a relative error of 3e-7: a soft cap may be far larger than its logits.
inline float vector_tanh_of_small(float x) {
  const float square = x * x;
  float p = -5.70498872745e-3f;  // of small x, where 1 - e cancels: Cephes
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  return std::fabs(x) < 0.625f ? x + x * square * p : vector_tanh(x);
}
inline double vector_tanh_of_small(double x) { return std::tanh(x); }

}  // namespace qpeft
