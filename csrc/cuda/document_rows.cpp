// Distinct ids of groups of documents, and the gather of their table rows: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distinct(Tensor document_ids, Tensor document_mask,
                                                                    Tensor group_index, int64_t num_groups,
                                                                    int64_t num_rows) {
  make_contiguous({&document_ids, &document_mask, &group_index});
  constexpr auto op = "document_rows_distinct";
  check_document_rows_distinct(document_ids, document_mask, group_index, num_groups, num_rows);
  using torch::stable::new_empty;
  const int64_t B = document_ids.size(0), S = document_ids.size(1);
  const DistinctSizes sizes{B, S, num_groups, 1, num_groups, num_rows, (num_rows + 31) / 32};
  const OnDevice on_device(document_ids);
  const Tensor ids = new_empty(document_ids, {B, S});
  const Tensor slots = new_empty(document_ids, {B, S}, ScalarType::Int);
  const Tensor counts = new_empty(document_ids, {B, S}, ScalarType::Int);
  const Tensor lengths = new_empty(document_ids, {B});
  const Tensor bits = torch::stable::new_zeros(document_ids, {sizes.G, sizes.words}, ScalarType::Int);
  const Tensor prefix = new_empty(bits, {sizes.G, sizes.words});
  const Tensor group_sizes = new_empty(bits, {sizes.G});
  const Tensor row_offsets = new_empty(document_ids, {sizes.G + 1});
  const Tensor rows = new_empty(document_ids, {most_rows(sizes)});
  const Tensor scratch = new_empty(bits, {2, scratch_blocks(sizes), sizes.V});
  const GroupedIds groups{data<uint32_t>(bits), data<int32_t>(prefix), data<int32_t>(group_sizes),
                          data<int64_t>(row_offsets), data<int64_t>(rows)};
  check_cuda(op, launch_document_rows_number(const_data<int64_t>(document_ids), const_data<bool>(document_mask),
                                             const_data<int64_t>(group_index), sizes, groups, on_device.stream));
  check_cuda(op, launch_document_rows_places(const_data<int64_t>(document_ids), const_data<bool>(document_mask),
                                             const_data<int64_t>(group_index), sizes, groups, data<int32_t>(scratch),
                                             data<int64_t>(ids), data<int32_t>(slots), data<int32_t>(counts),
                                             data<int64_t>(lengths), on_device.stream));
  return {rows, row_offsets, ids, slots, counts, lengths};
}

void gather(Tensor table, Tensor rows, Tensor block, std::optional<Tensor> inverse_norms) {
  make_rows_contiguous({&table});
  make_contiguous({&rows});
  constexpr auto op = "document_rows_gather";
  check_document_rows_gather(table, rows, block, inverse_norms, table.scalar_type());
  const OnDevice on_device(table);
  dispatch_table<__half, __nv_bfloat16>(op, table.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    Sum* norms = inverse_norms ? data<Sum>(*inverse_norms) : nullptr;
    check_cuda(op, launch_document_rows_gather(const_data<Row>(table), table.stride(0), const_data<int64_t>(rows),
                                               rows.size(0), table.size(0), table.size(1), data<Row>(block),
                                               block.stride(0), norms, on_device.stream));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("document_rows_distinct", TORCH_BOX(&distinct));
  m.impl("document_rows_gather", TORCH_BOX(&gather));
}

}  // namespace
}  // namespace qpeft
