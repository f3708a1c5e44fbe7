// Distinct ids of groups of documents, and the gather of their table rows.
//   Parallel over   distinct: one thread, O(B * S) steps of a table look-up (40 us for 100 documents of 200 tokens);
//                   gather: blocks of rows
//   Memory traffic  gather: reads each row once, writes it once; the norm is taken while the row is in the cache
//   Precision       norms in the dtype of sums
//   Deterministic   yes: distinct ids in the order of first appearance
#include <memory>
#include <vector>

#include "cpu/common.h"

namespace qpeft {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distinct(Tensor document_ids, Tensor document_mask,
                                                                    Tensor group_index, int64_t num_groups,
                                                                    int64_t num_rows) {
  make_contiguous({&document_ids, &document_mask, &group_index});
  check_document_rows_distinct(document_ids, document_mask, group_index, num_groups, num_rows);
  using torch::stable::new_empty;
  const int64_t B = document_ids.size(0), S = document_ids.size(1);
  const auto* id_at = const_data<int64_t>(document_ids);
  const auto* mask_at = const_data<bool>(document_mask);
  const auto* group_of = const_data<int64_t>(group_index);

  const Tensor row_offsets = new_empty(group_index, {num_groups + 1});
  const Tensor ids = new_empty(document_ids, {B, S});
  const Tensor slots = new_empty(document_ids, {B, S}, ScalarType::Int);
  const Tensor counts = new_empty(document_ids, {B, S}, ScalarType::Int);
  const Tensor lengths = new_empty(document_ids, {B});
  auto* offset_at = data<int64_t>(row_offsets);
  auto* out_ids = data<int64_t>(ids);
  auto* out_slots = data<int32_t>(slots);
  auto* out_counts = data<int32_t>(counts);
  auto* out_lengths = data<int64_t>(lengths);

  // pairs by group, their order kept
  std::vector<int64_t> pair_offsets(num_groups + 1), pairs(B);
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(group_of[b] >= 0 && group_of[b] < num_groups, "document_rows_distinct: group_index[", b,
                    "] = ", group_of[b], " is outside [0, ", num_groups, ")");
    ++pair_offsets[group_of[b] + 1];
  }
  for (int64_t g = 0; g < num_groups; ++g) pair_offsets[g + 1] += pair_offsets[g];
  {
    std::vector<int64_t> next(pair_offsets.begin(), pair_offsets.end() - 1);
    for (int64_t b = 0; b < B; ++b) pairs[next[group_of[b]]++] = b;
  }

  struct Seen {
    int32_t slot;   // 1 + the row in `rows`, 0: not yet in this group
    int32_t pair;   // 1 + the last document that had the id
    int32_t place;  // where in that document's distinct ids
  };
  const std::unique_ptr<Seen[]> seen(new Seen[num_rows]());
  std::vector<int64_t> rows;
  offset_at[0] = 0;
  for (int64_t g = 0; g < num_groups; ++g) {
    for (int64_t p = pair_offsets[g]; p < pair_offsets[g + 1]; ++p) {
      const int64_t b = pairs[p];
      int32_t n = 0;
      for (int64_t j = b * S; j < (b + 1) * S; ++j) {
        if (!mask_at[j]) continue;
        const int64_t id = id_at[j];
        STD_TORCH_CHECK(id >= 0 && id < num_rows, "document_rows_distinct: document_ids[", b, ", ", j - b * S,
                        "] = ", id, " is outside [0, ", num_rows, ")");
        Seen& entry = seen[id];
        if (entry.slot == 0) {
          rows.push_back(id);
          entry.slot = static_cast<int32_t>(rows.size());
        }
        if (entry.pair == b + 1) {
          ++out_counts[b * S + entry.place];
          continue;
        }
        entry.pair = static_cast<int32_t>(b + 1);
        entry.place = n;
        out_ids[b * S + n] = id, out_slots[b * S + n] = entry.slot - 1, out_counts[b * S + n] = 1;
        ++n;
      }
      out_lengths[b] = n;
      for (int64_t j = b * S + n; j < (b + 1) * S; ++j) out_ids[j] = -1, out_slots[j] = -1, out_counts[j] = 0;
    }
    for (int64_t u = offset_at[g]; u < static_cast<int64_t>(rows.size()); ++u) seen[rows[u]].slot = 0;
    offset_at[g + 1] = static_cast<int64_t>(rows.size());
  }
  const Tensor out_rows = new_empty(document_ids, {static_cast<int64_t>(rows.size())});
  std::copy(rows.begin(), rows.end(), data<int64_t>(out_rows));
  return {out_rows, row_offsets, ids, slots, counts, lengths};
}

// Copies a row in the dtype of sums and returns its squared norm. Lanes, since a single sum may not be reordered.
template <typename Row, typename Sum>
Sum copy_row(const Row* row, Sum* out, int64_t D) {
  constexpr int kLanes = 16;
  Sum lane[kLanes] = {}, sum = 0;
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const Sum x = static_cast<Sum>(row[d + l]);
      out[d + l] = x;
      lane[l] += x * x;
    }
  for (; d < D; ++d) {
    const Sum x = static_cast<Sum>(row[d]);
    out[d] = x;
    sum += x * x;
  }
  for (int l = 0; l < kLanes; ++l) sum += lane[l];
  return sum;
}

void gather(Tensor table, Tensor rows, Tensor block, std::optional<Tensor> inverse_norms) {
  make_rows_contiguous({&table});
  make_contiguous({&rows});
  check_document_rows_gather(table, rows, block, inverse_norms, sum_dtype(table.scalar_type()));
  const int64_t n = rows.size(0), V = table.size(0), D = table.size(1);
  if (n == 0) return;
  const auto* row_at = const_data<int64_t>(rows);
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(row_at[i] >= -1 && row_at[i] < V, "document_rows_gather: rows[", i, "] = ", row_at[i],
                    " is outside [-1, ", V, ")");
  const int64_t table_stride = table.stride(0), block_stride = block.stride(0);
  dispatch_table<c10::Half, c10::BFloat16>(
      "document_rows_gather", table.scalar_type(), [&](auto row_tag, auto sum_tag) {
        using Row = decltype(row_tag);
        using Sum = decltype(sum_tag);
        const auto* from = const_data<Row>(table);
        auto* to = data<Sum>(block);
        auto* norms = data<Sum>(inverse_norms);
        parallel(n, 16384 / std::max<int64_t>(D, 1), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Sum* out = to + i * block_stride;
            Sum square = 0;
            if (row_at[i] < 0)
              std::fill(out, out + D, Sum(0));
            else
              square = copy_row(from + row_at[i] * table_stride, out, D);
            if (norms) norms[i] = square > 0 ? 1 / std::sqrt(square) : (square == 0 ? Sum(0) : square);  // NaN stays
          }
        });
      });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("document_rows_distinct", TORCH_BOX(&distinct));
  m.impl("document_rows_gather", TORCH_BOX(&gather));
}

}  // namespace
}  // namespace qpeft
