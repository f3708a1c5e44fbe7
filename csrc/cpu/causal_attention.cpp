// Attention in float32 of queries to the keys up to their own: a prefix to itself, or suffixes to their prefixes and themselves.
// The heads of queries that share a head of keys are its rows.
//   Threads         over items and heads of keys; where these are few, over blocks of rows too
//   Precision       scores, weights and sums in float32
//   Deterministic   yes; an item does not depend on the others, nor a row on the number of threads
//   Why             torch's kernel takes 1.2 to 2.2 times as long for prefixes and suffixes of some hundred tokens
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/common.h"
#include "cpu/instructions.h"

namespace qpeft {
namespace {

// One head of keys and values [S, D] of an item, and the queries of the heads that share it, as rows: head by head, L of each.
// Query l sees the keys from start to S - L + l. room: S, rounded up.
struct CausalHead {
  const float *query, *key, *value;
  float* out;
  int64_t L, S, D, start, room;
  int64_t query_head, query_token, key_token, value_token, out_head, out_token;  // strides
  float scale;
};

// Vectors of 4 numbers (any processor) or 16 (AVX-512)
template <int kBytes>
struct Vectors {
  using Vector [[gnu::vector_size(kBytes)]] = float;
  using Unaligned [[gnu::vector_size(kBytes), gnu::aligned(4), gnu::may_alias]] = float;
  using Places [[gnu::vector_size(kBytes)]] = int32_t;
  static constexpr int kLanes = kBytes / 4;
};
template <typename V>
using VectorOf = typename V::Vector;

template <typename V>
QPEFT_INLINE inline VectorOf<V> load(const float* from) {
  return *reinterpret_cast<const typename V::Unaligned*>(from);
}
template <typename V>
QPEFT_INLINE inline void store(float* to, const VectorOf<V>& x) {
  *reinterpret_cast<typename V::Unaligned*>(to) = x;
}

// sums[r][p] = sum over k < n of rows[r][k] * (the vector at matrix + k * step + p * apart)
template <typename V, int kRows, int kParts>
QPEFT_INLINE inline void multiply(const float* const (&rows)[kRows], int64_t n, const float* matrix, int64_t step,
                                  int64_t apart, VectorOf<V> (&sums)[kRows][kParts]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) sums[r][p] = VectorOf<V>{};
  for (int64_t k = 0; k < n; ++k) {
    VectorOf<V> numbers[kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) numbers[p] = load<V>(matrix + k * step + p * apart);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float factor = rows[r][k];
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) sums[r][p] += factor * numbers[p];
    }
  }
}

// The same, and to(r, p, sums[r][p] * factors[r]) for all parts of a row: kParts at a time, then one.
template <typename V, int kRows, int kParts, typename To>
QPEFT_INLINE inline void multiply_row(const float* const (&rows)[kRows], int64_t n, const float* matrix, int64_t step,
                                      int64_t apart, int64_t parts, const float (&factors)[kRows], const To& to) {
  int64_t part = 0;
  for (; part + kParts <= parts; part += kParts) {
    VectorOf<V> sums[kRows][kParts];
    multiply<V, kRows, kParts>(rows, n, matrix + part * apart, step, apart, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int p = 0; p < kParts; ++p) to(r, part + p, sums[r][p] * factors[r]);
  }
  for (; part < parts; ++part) {
    VectorOf<V> sums[kRows][1];
    multiply<V, kRows, 1>(rows, n, matrix + part * apart, step, apart, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) to(r, part, sums[r][0] * factors[r]);
  }
}

// Turns scores begin .. end of a row into weights, not yet divided by their sum, and the others up to `padded` into 0.
// Returns the sum.
template <typename V>
QPEFT_INLINE inline float weigh(float* scores, int64_t begin, int64_t end, int64_t padded) {
  constexpr float kLowest = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < begin; ++i) scores[i] = kLowest;
  for (int64_t i = end; i < padded; ++i) scores[i] = kLowest;
  VectorOf<V> largest = load<V>(scores), sums{};
  for (int64_t i = V::kLanes; i < padded; i += V::kLanes) {
    const VectorOf<V> x = load<V>(scores + i);
    largest = x > largest ? x : largest;
  }
  float most = largest[0], sum = 0;
  for (int l = 1; l < V::kLanes; ++l) most = std::max(most, largest[l]);
  if (most == kLowest) most = 0;
  for (int64_t i = 0; i < padded; ++i) scores[i] = vector_exp(scores[i] - most);
  for (int64_t i = 0; i < padded; i += V::kLanes) sums += load<V>(scores + i);
  for (int l = 0; l < V::kLanes; ++l) sum += sums[l];
  return sum;
}

// Rows begin .. end, kRows of them at most
template <typename V, int kRows, int kParts>
QPEFT_INLINE inline void attend_rows(const CausalHead& head, int64_t begin, int64_t end, const float* keys,
                                     float* scores) {
  const int64_t first = head.start / V::kLanes * V::kLanes;
  const float *queries[kRows], *weights[kRows];
  float *outs[kRows], factors[kRows];
  int64_t ends[kRows], last = head.start;
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = std::min<int64_t>(begin + r, end - 1), h = row / head.L, l = row % head.L;
    queries[r] = head.query + h * head.query_head + l * head.query_token;
    outs[r] = head.out + h * head.out_head + l * head.out_token;
    weights[r] = scores + r * head.room + head.start - first;
    ends[r] = std::max(head.S - head.L + l + 1, head.start);
    last = std::max(last, ends[r]);
    factors[r] = head.scale;
  }
  const int64_t parts = (last - first + V::kLanes - 1) / V::kLanes;
  multiply_row<V, kRows, kParts>(queries, head.D, keys + first * head.D, V::kLanes, head.D * V::kLanes, parts, factors,
                                 [&](int r, int64_t part, const VectorOf<V>& x)
                                     QPEFT_INLINE { store<V>(scores + r * head.room + part * V::kLanes, x); });
  for (int r = 0; r < kRows; ++r) {
    const int64_t from = head.start - first;
    const float sum = weigh<V>(scores + r * head.room, from, ends[r] - first, std::max<int64_t>(parts, 1) * V::kLanes);
    factors[r] = ends[r] > head.start ? 1.0f / sum : 0.0f;
  }
  multiply_row<V, kRows, kParts>(weights, last - head.start, head.value + head.start * head.value_token,
                                 head.value_token, V::kLanes, head.D / V::kLanes, factors,
                                 [&](int r, int64_t part, const VectorOf<V>& x) QPEFT_INLINE {
                                   if (begin + r < end) store<V>(outs[r] + part * V::kLanes, x);
                                 });
}

// A square of numbers: rows become columns. They move by 1, 2, 4 and 8 places in turn.
template <typename V>
QPEFT_INLINE inline void transpose(VectorOf<V> (&rows)[V::kLanes]) {
#pragma GCC unroll 4
  for (int distance = 1; distance < V::kLanes; distance *= 2) {
    typename V::Places first{}, second{};
#pragma GCC unroll 16
    for (int l = 0; l < V::kLanes; ++l) {
      first[l] = l & distance ? V::kLanes + l - distance : l;
      second[l] = l & distance ? V::kLanes + l : l + distance;
    }
#pragma GCC unroll 16
    for (int i = 0; i < V::kLanes; ++i)
      if (!(i & distance)) {
        const VectorOf<V> x = rows[i], y = rows[i + distance];
        rows[i] = __builtin_shuffle(x, y, first), rows[i + distance] = __builtin_shuffle(x, y, second);
      }
  }
}

// keys: [S / lanes, D, lanes], from the one before `start` on; what is behind the last key is 0.
template <typename V>
QPEFT_INLINE inline void pack(const CausalHead& head, float* keys) {
  for (int64_t s = head.start / V::kLanes * V::kLanes; s < head.S; s += V::kLanes)
    for (int64_t d = 0; d < head.D; d += V::kLanes) {
      VectorOf<V> rows[V::kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < V::kLanes; ++j)
        rows[j] = s + j < head.S ? load<V>(head.key + (s + j) * head.key_token + d) : VectorOf<V>{};
      transpose<V>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < V::kLanes; ++i) store<V>(keys + s * head.D + (d + i) * V::kLanes, rows[i]);
    }
}

template <typename V, int kRows, int kParts>
QPEFT_INLINE inline void attend(const CausalHead& head, int64_t begin, int64_t end, bool packed, float* keys,
                                float* scores) {
  if (!packed) pack<V>(head, keys);
  for (int64_t row = begin; row < end; row += kRows) attend_rows<V, kRows, kParts>(head, row, end, keys, scores);
}

// Rows begin .. end of a head. keys: room for S, rounded up to 16, times D, and whether the head's are in it already;
// scores: for kMostRows rows of head.room.
constexpr int64_t kMostRows = 8, kRoom = 16;
using Attend = void (*)(const CausalHead& head, int64_t begin, int64_t end, bool packed, float* keys, float* scores);

void attend_anywhere(const CausalHead& head, int64_t begin, int64_t end, bool packed, float* keys, float* scores) {
  attend<Vectors<16>, 4, 2>(head, begin, end, packed, keys, scores);
}

#if defined(__x86_64__) && defined(__gnu_linux__)
__attribute__((target("avx512f,avx2,fma"))) void attend_avx512(const CausalHead& head, int64_t begin, int64_t end,
                                                               bool packed, float* keys, float* scores) {
  attend<Vectors<64>, kMostRows, 2>(head, begin, end, packed, keys, scores);  // 16 sums: they hide an addition's time
}

bool has_avx512() { return __builtin_cpu_supports("avx512f") && instructions_cap() != Cap::kAvx2; }
#else
constexpr Attend attend_avx512 = attend_anywhere;
bool has_avx512() { return false; }
#endif

// With AVX2 such a kernel was 0.7 to 1.3 times as fast as torch's, so there is none.
bool causal_attention_is_faster() {
  static const bool found = has_avx512();
  return found;
}

void check(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<int64_t>& starts) {
  constexpr auto op = "causal_attention";
  for (const Tensor* x : {&query, &key, &value}) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, op, ": query, key and value must be float32");
    STD_TORCH_CHECK(x->dim() == 4, op, ": query, key and value must have 4 dimensions, got ", x->dim());
    STD_TORCH_CHECK(x->numel() == 0 || x->size(3) == 1 || x->stride(3) == 1, op, ": the last stride must be 1");
  }
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3);
  const int64_t K = key.size(1), S = key.size(2);
  STD_TORCH_CHECK(D > 0 && D % 16 == 0, op, ": the last size must be a multiple of 16, got ", D);
  STD_TORCH_CHECK(key.size(0) == B && K > 0 && H % K == 0 && key.size(3) == D, op,
                  ": key must have the items of query, a number of heads that divides that of query, and its width");
  STD_TORCH_CHECK(value.size(0) == B && value.size(1) == K && value.size(2) == S && value.size(3) == D, op,
                  ": value must have the sizes of key");
  STD_TORCH_CHECK(L <= S, op, ": there must be at least as many keys as queries, got ", S, " and ", L);
  STD_TORCH_CHECK(static_cast<int64_t>(starts.size()) == B, op, ": starts must have ", B, " numbers, got ",
                  starts.size());
  for (const int64_t start : starts)
    STD_TORCH_CHECK(0 <= start && start <= S, op, ": starts must be in [0, ", S, "], got ", start);
}

Tensor causal_attention(Tensor query, Tensor key, Tensor value, std::vector<int64_t> starts, double scale) {
  check(query, key, value, starts);
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3);
  const int64_t heads = key.size(1), S = key.size(2), shared = H / heads, rows = shared * L;
  Tensor out = torch::stable::new_empty(query, {B, L, H, D});
  const Attend attend = causal_attention_is_faster() ? attend_avx512 : attend_anywhere;
  const int64_t room = (S + kRoom - 1) / kRoom * kRoom, wanted = 2 * int64_t(torch::stable::get_num_threads());
  const int64_t parts = B == 0 || rows == 0 ? 1 : std::clamp<int64_t>(wanted / (B * heads), 1, (rows + 63) / 64);
  const int64_t of_part = ((rows + parts - 1) / parts + kMostRows - 1) / kMostRows * kMostRows;
  parallel(rows == 0 ? 0 : B * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> keys(new float[room * D]), scores(new float[kMostRows * room]);
    int64_t packed = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts / heads, h = i / parts % heads, first = std::min(i % parts * of_part, rows);
      const CausalHead head = {const_data<float>(query) + b * query.stride(0) + h * shared * query.stride(1),
                               const_data<float>(key) + b * key.stride(0) + h * key.stride(1),
                               const_data<float>(value) + b * value.stride(0) + h * value.stride(1),
                               data<float>(out) + b * L * H * D + h * shared * D,
                               L,
                               S,
                               D,
                               starts[b],
                               room,
                               query.stride(1),
                               query.stride(2),
                               key.stride(2),
                               value.stride(2),
                               D,
                               H * D,
                               static_cast<float>(scale)};
      attend(head, first, std::min(first + of_part, rows), packed == i / parts, keys.get(), scores.get());
      packed = i / parts;
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) { m.impl("causal_attention", TORCH_BOX(&causal_attention)); }

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CompositeExplicitAutograd, m) {
  m.impl("causal_attention_is_faster", TORCH_BOX(&causal_attention_is_faster));
}

}  // namespace
}  // namespace qpeft
