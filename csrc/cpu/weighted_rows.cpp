// Sums of weighted rows by segments: the backward of a gather, written or added to out.
//   out[g, :] = sum over e in offsets[g] .. offsets[g + 1] of weights[e] * source[rows[e], :]
//   Parallel over   (segment, part of a row)
//   Memory traffic  each row that is named once; a part of the result stays in the nearest cache
//   Precision       the dtype of sums
//   Deterministic   yes: entries in order
#include "cpu/common.h"

namespace qpeft {
namespace {

void weighted_rows(Tensor source, Tensor rows, std::optional<Tensor> weights, Tensor offsets, bool accumulate,
                   Tensor out) {
  constexpr auto op = "weighted_rows";
  make_rows_contiguous({&source});
  make_contiguous({&rows, &offsets});
  make_contiguous(weights);
  check_weighted_rows(source, rows, weights, offsets, out);
  const int64_t G = offsets.size(0) - 1, N = source.size(0), D = source.size(1), E = rows.size(0),
                stride = source.stride(0);
  const auto* row_at = const_data<int64_t>(rows);
  const auto* offset_at = const_data<int64_t>(offsets);
  for (int64_t g = 0; g < G; ++g)
    STD_TORCH_CHECK(offset_at[g] >= 0 && offset_at[g] <= offset_at[g + 1] && offset_at[g + 1] <= E, op, ": offsets[", g,
                    "] to offsets[", g + 1, "] are no range in [0, ", E, "]");
  for (int64_t e = G == 0 ? 0 : offset_at[0]; e < (G == 0 ? 0 : offset_at[G]); ++e)
    STD_TORCH_CHECK(row_at[e] >= 0 && row_at[e] < N, op, ": rows[", e, "] = ", row_at[e], " is outside [0, ", N, ")");
  dispatch_table<c10::Half, c10::BFloat16>(op, source.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    const auto* from = const_data<Row>(source);
    const auto* weight_at = const_data<Sum>(weights);
    auto* to = data<Sum>(out);
    constexpr int64_t kPart = 2048;
    const int64_t parts = (D + kPart - 1) / kPart;
    parallel(G * parts, 16384 / std::max<int64_t>(E / std::max<int64_t>(G, 1) * std::min(D, kPart), 1),
             [&](int64_t first, int64_t last) {
               for (int64_t at = first; at < last; ++at) {
                 const int64_t g = at / parts, begin = at % parts * kPart, n = std::min(kPart, D - begin);
                 Sum* sum = to + g * D + begin;
                 if (!accumulate) std::fill(sum, sum + n, Sum(0));
                 for (int64_t e = offset_at[g]; e < offset_at[g + 1]; ++e) {
                   const Row* row = from + row_at[e] * stride + begin;
                   const Sum weight = weight_at ? weight_at[e] : Sum(1);
                   for (int64_t d = 0; d < n; ++d) sum[d] += weight * static_cast<Sum>(row[d]);
                 }
               }
             });
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) { m.impl("weighted_rows", TORCH_BOX(&weighted_rows)); }

}  // namespace
}  // namespace qpeft
