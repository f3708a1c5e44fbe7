// One chunk of the vocabulary into the running log-sum-exp of each row, and the gradient of a chunk: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

template <typename Sum>
Chunk<Sum> make_chunk(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& target_ids, int64_t first,
                      double logit_scale, std::optional<double> soft_cap) {
  return {data<Sum>(logits),       logits.stride(0),
          const_data<Sum>(bias),   const_data<int64_t>(target_ids),
          logits.size(0),          logits.size(1),
          first,                   static_cast<Sum>(logit_scale),
          static_cast<Sum>(soft_cap.value_or(0))};
}

void chunk(Tensor logits, std::optional<Tensor> bias, const Tensor target_ids, int64_t first, double logit_scale,
           std::optional<double> soft_cap, Tensor running, bool keep_probabilities) {
  check_token_log_likelihood_chunk(logits, bias, target_ids, running);
  const OnDevice on_device(logits);
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("token_log_likelihood_chunk",
               launch_token_log_likelihood_chunk(make_chunk<Sum>(logits, bias, target_ids, first, logit_scale, soft_cap),
                                                 data<Sum>(running), keep_probabilities, on_device.stream));
  });
}

void chunk_backward(Tensor logits, std::optional<Tensor> bias, const Tensor target_ids, int64_t first, double logit_scale,
                    std::optional<double> soft_cap, const Tensor lse, const Tensor grad) {
  check_token_log_likelihood_chunk_backward(logits, bias, target_ids, lse, grad);
  const OnDevice on_device(logits);
  dispatch_sum(logits.scalar_type(), [&](auto tag) {
    using Sum = decltype(tag);
    check_cuda("token_log_likelihood_chunk_backward",
               launch_token_log_likelihood_chunk_backward(
                   make_chunk<Sum>(logits, bias, target_ids, first, logit_scale, soft_cap), const_data<Sum>(lse),
                   const_data<Sum>(grad), on_device.stream));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("token_log_likelihood_chunk", TORCH_BOX(&chunk));
  m.impl("token_log_likelihood_chunk_backward", TORCH_BOX(&chunk_backward));
}

}  // namespace
}  // namespace qpeft
