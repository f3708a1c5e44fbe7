// Scalar algebra shared by the CPU and the CUDA kernels. No torch here: .cu files include it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define QPEFT_HD __host__ __device__ __forceinline__
#else
#define QPEFT_HD inline
#endif

namespace qpeft {

// A candidate of a top-k or an arg-max, in total order: NaN first (it must be seen), then the larger score, then the
// smaller position.
template <typename T>
struct Candidate {
  T score;
  int32_t position;

  QPEFT_HD bool before(Candidate other) const {
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan != other_nan) return nan;
    if (!nan && score != other.score) return score > other.score;
    return position < other.position;
  }
};

// Rounds to 17 of 23 mantissa bits (double: 44 of 52), to nearest: scores that are equal up to the order of a sum become equal.
// round_scores in qpeft_ext/ops/similarity_topk.py is the same. A NaN stays one.
QPEFT_HD float round_score(float score) {
  if (score != score) return score;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits = (bits + 0x20u) & ~0x3Fu;
  std::memcpy(&score, &bits, sizeof(bits));
  return score;
}
QPEFT_HD double round_score(double score) {
  if (score != score) return score;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  bits = (bits + 0x80u) & ~uint64_t(0xFF);
  std::memcpy(&score, &bits, sizeof(bits));
  return score;
}

// Where `at` is in a list of `size` numbers that begins with `first`, -1: not in it. Unsigned, since the difference of two
// numbers of a caller may be too large for int64.
QPEFT_HD int64_t place_in(int64_t at, int64_t first, int64_t size) {
  const uint64_t place = static_cast<uint64_t>(at) - static_cast<uint64_t>(first);
  return place < static_cast<uint64_t>(size) ? static_cast<int64_t>(place) : -1;
}

// z = cap * tanh(u / cap), and dz/du written with z alone, so that a backward needs no second tanh.
template <typename T>
struct SoftCap {
  T cap;  // 0 = none

  QPEFT_HD T operator()(T u) const { return cap == 0 ? u : cap * std::tanh(u / cap); }
  QPEFT_HD T slope(T z) const { return cap == 0 ? T(1) : 1 - (z / cap) * (z / cap); }
};

// A float32 of 64 and more has an error of 4e-6 and more: too much for a logarithm of probabilities, or as a factor of an error.
template <typename T>
QPEFT_HD bool is_large(T x) {
  return std::abs(x) >= 64;
}

// z - (max + log_sum), or the difference first.
template <typename T>
QPEFT_HD T log_probability(T z, T max, T log_sum) {
  return is_large(max) ? z - max - log_sum : z - (max + log_sum);
}

// log(sum of exp z) of some words: max + log(sum). An aggregate, so that shared memory can hold it.
template <typename T>
struct LogSumExp {
  T max, sum;

  QPEFT_HD static LogSumExp none() { return {-INFINITY, 0}; }

  template <int kCount>
  QPEFT_HD void add(const T* z) {
    T larger = max;
    for (int i = 0; i < kCount; ++i) larger = z[i] > larger ? z[i] : larger;
    if (larger > max) sum *= std::exp(max - larger), max = larger;
    // -inf - -inf would be NaN
    for (int i = 0; i < kCount; ++i) sum += z[i] == -INFINITY ? T(0) : std::exp(z[i] - max);
  }
  QPEFT_HD void merge(LogSumExp other) {  // associative
    const T larger = other.max > max ? other.max : max;
    if (larger == -INFINITY)
      sum += other.sum;  // both 0, or NaN
    else
      sum = sum * std::exp(max - larger) + other.sum * std::exp(other.max - larger);
    max = larger;
  }
};

}  // namespace qpeft
