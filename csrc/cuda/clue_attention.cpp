// Softmax of attention scores over the distinct tokens of each document, and its backward: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

Tensor softmax(const Tensor scores, const Tensor slots, const Tensor counts, int64_t first_slot) {
  check_clue_attention_softmax(scores, slots, counts);
  const SoftmaxSizes sizes{slots.size(0), slots.size(1), scores.size(0), scores.size(1), first_slot};
  const OnDevice on_device(scores);
  const Tensor weights = torch::stable::new_empty(scores, {sizes.P, sizes.n, sizes.R});
  dispatch_sum(scores.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("clue_attention_softmax",
               launch_clue_attention_softmax(const_data<Sum>(scores), const_data<int32_t>(slots), const_data<int32_t>(counts),
                                             sizes, data<Sum>(weights), on_device.stream));
  });
  return weights;
}

void softmax_backward(const Tensor weights, Tensor grad_weights, const Tensor slots, int64_t first_slot,
                      Tensor grad_scores) {
  check_clue_attention_softmax_backward(weights, grad_weights, slots, grad_scores);
  const SoftmaxSizes sizes{slots.size(0), slots.size(1), grad_scores.size(0), grad_scores.size(1), first_slot};
  const OnDevice on_device(weights);
  Tensor places = torch::stable::new_empty(slots, {sizes.P, sizes.U});
  torch::stable::fill_(places, -1);
  dispatch_sum(weights.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("clue_attention_softmax_backward",
               launch_clue_attention_softmax_backward(const_data<Sum>(weights), data<Sum>(grad_weights),
                                                      const_data<int32_t>(slots), sizes, data<int32_t>(places),
                                                      data<Sum>(grad_scores), on_device.stream));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("clue_attention_softmax", TORCH_BOX(&softmax));
  m.impl("clue_attention_softmax_backward", TORCH_BOX(&softmax_backward));
}

}  // namespace
}  // namespace qpeft
