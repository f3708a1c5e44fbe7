// Softmax of attention scores over the distinct tokens of each document, its backward, and the gathered products: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

SoftmaxSizes softmax_sizes(const Tensor& slots, int64_t U, int64_t R, int64_t first_slot) {
  return {slots.size(0), slots.size(1), U, R, first_slot};
}

void log_sum_exp(Tensor scores, Tensor slots, Tensor counts, int64_t first_slot, Tensor lse) {
  constexpr auto op = "clue_attention_lse";
  make_contiguous({&scores, &slots, &counts});
  check_clue_attention_lse(op, scores, slots, counts, lse);
  const SoftmaxSizes sizes = softmax_sizes(slots, scores.size(0), scores.size(1), first_slot);
  const OnDevice on_device(scores);
  dispatch_sum(scores.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda(op, launch_clue_attention_lse(const_data<Sum>(scores), const_data<int32_t>(slots),
                                             const_data<int32_t>(counts), sizes, data<Sum>(lse), on_device.stream));
  });
}

void weigh(Tensor scores, Tensor slots, Tensor counts, Tensor lse, int64_t first_slot, Tensor weights) {
  constexpr auto op = "clue_attention_weights";
  make_contiguous({&scores, &slots, &counts, &lse});
  check_clue_attention_weights(scores, slots, counts, lse, weights, weights.scalar_type());
  expect_sums_of(op, "scores", scores, "weights", weights);
  const SoftmaxSizes sizes = softmax_sizes(slots, scores.size(0), scores.size(1), first_slot);
  const OnDevice on_device(scores);
  dispatch_table<__half, __nv_bfloat16>(op, weights.scalar_type(), [&](auto weight_tag, auto sum_tag) {
    using Weight = decltype(weight_tag);
    using Sum = decltype(sum_tag);
    check_cuda(op, launch_clue_attention_weights(const_data<Sum>(scores), const_data<int32_t>(slots),
                                                 const_data<int32_t>(counts), const_data<Sum>(lse), sizes,
                                                 data<Weight>(weights), on_device.stream));
  });
}

void softmax_backward(Tensor weights, Tensor slots, Tensor grad_weights) {
  constexpr auto op = "clue_attention_softmax_backward";
  make_contiguous({&weights, &slots});
  check_clue_attention_softmax_backward(weights, slots, grad_weights, weights.scalar_type());
  expect_sums_of(op, "grad_weights", grad_weights, "weights", weights);
  const SoftmaxSizes sizes = softmax_sizes(slots, 0, weights.size(2), 0);
  const OnDevice on_device(weights);
  dispatch_table<__half, __nv_bfloat16>(op, weights.scalar_type(), [&](auto weight_tag, auto sum_tag) {
    using Weight = decltype(weight_tag);
    using Sum = decltype(sum_tag);
    check_cuda(op, launch_clue_attention_softmax_backward(const_data<Weight>(weights), const_data<int32_t>(slots),
                                                          sizes, data<Sum>(grad_weights), on_device.stream));
  });
}

template <typename Row>
GatheredRows<Row> gathered_rows(const Tensor& table, const Tensor& rows, const std::optional<Tensor>& offsets,
                                const std::optional<Tensor>& lengths) {
  const int64_t n = rows.size(0), lists = offsets ? offsets->size(0) - 1 : lengths->size(0),
                stride = lists ? n / lists : 0;
  return {const_data<Row>(table),
          table.stride(0),
          table.size(0),
          table.size(1),
          const_data<int64_t>(rows),
          const_data<int64_t>(offsets),
          const_data<int64_t>(lengths),
          n,
          stride,
          lists,
          offsets ? n : stride};
}

void products(Tensor table, Tensor rows, std::optional<Tensor> offsets, std::optional<Tensor> lengths, Tensor dense,
              Tensor out) {
  constexpr auto op = "clue_attention_products";
  make_rows_contiguous({&table});
  make_contiguous({&rows, &dense});
  make_contiguous(offsets);
  make_contiguous(lengths);
  check_clue_attention_products(table, rows, offsets, lengths, dense, out);
  const OnDevice on_device(table);
  dispatch_table<__half, __nv_bfloat16>(op, table.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    check_cuda(op,
               launch_clue_attention_products(gathered_rows<Row>(table, rows, offsets, lengths), const_data<Row>(dense),
                                              dense.size(1), data<Sum>(out), on_device.stream));
  });
}

void weighted_sums(Tensor table, Tensor rows, std::optional<Tensor> offsets, std::optional<Tensor> lengths,
                   Tensor weights, int64_t heads, bool accumulate, Tensor out) {
  constexpr auto op = "clue_attention_weighted_sums";
  make_rows_contiguous({&table});
  make_contiguous({&rows, &weights});
  make_contiguous(offsets);
  make_contiguous(lengths);
  check_clue_attention_weighted_sums(table, rows, offsets, lengths, weights, heads, out);
  const OnDevice on_device(table);
  dispatch_table<__half, __nv_bfloat16>(op, table.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    const auto start = [&](auto* to) {
      check_cuda(op, launch_clue_attention_weighted_sums(gathered_rows<Row>(table, rows, offsets, lengths),
                                                         const_data<Row>(weights), weights.size(1) / heads, heads,
                                                         accumulate, to, on_device.stream));
    };
    if (out.scalar_type() == table.scalar_type())
      start(data<Row>(out));
    else
      start(data<Sum>(out));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("clue_attention_lse", TORCH_BOX(&log_sum_exp));
  m.impl("clue_attention_weights", TORCH_BOX(&weigh));
  m.impl("clue_attention_softmax_backward", TORCH_BOX(&softmax_backward));
  m.impl("clue_attention_products", TORCH_BOX(&products));
  m.impl("clue_attention_weighted_sums", TORCH_BOX(&weighted_sums));
}

}  // namespace
}  // namespace qpeft
