// Adds a chunk of the vocabulary to the running log-sum-exp of each row; the end after the last chunk; a chunk's gradient.
#include "glue.h"

namespace qpeft {
namespace {

template <typename Sum>
Chunk<Sum> make_chunk(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& target_ids, int64_t first,
                      double logit_scale, std::optional<double> soft_cap) {
  return {data<Sum>(logits),
          logits.stride(0),
          const_data<Sum>(bias),
          const_data<int64_t>(target_ids),
          logits.size(0),
          logits.size(1),
          first,
          static_cast<Sum>(logit_scale),
          cap_or_none<Sum>(soft_cap)};
}

void chunk(Tensor logits, std::optional<Tensor> bias, Tensor target_ids, int64_t first, double logit_scale,
           std::optional<double> soft_cap, Tensor running, std::optional<Tensor> expectation, ScalarType kept) {
  constexpr auto op = "token_log_likelihood_chunk";
  make_contiguous({&target_ids});
  make_contiguous(bias);
  check_token_log_likelihood_chunk(logits, bias, target_ids, running, expectation, kept);
  expect_soft_cap(op, soft_cap);
  const OnDevice on_device(logits);
  dispatch_table<__half, __nv_bfloat16>(op, kept, [&](auto tag, auto sum) {
    using Kept = decltype(tag);
    using Sum = decltype(sum);
    check_cuda(op, launch_token_log_likelihood_chunk<Kept>(
                       make_chunk<Sum>(logits, bias, target_ids, first, logit_scale, soft_cap), data<Sum>(running),
                       expectation ? data<Sum>(*expectation) : nullptr, expectation ? expectation->size(1) : 0,
                       on_device.stream));
  });
}

void finish(Tensor running, const Tensor lm_head, Tensor target_ids, double logit_scale, std::optional<double> soft_cap,
            Tensor log_p, Tensor lse, std::optional<Tensor> expectation) {
  constexpr auto op = "token_log_likelihood_finish";
  make_contiguous({&running, &target_ids});
  check_token_log_likelihood_finish(running, lm_head, target_ids, log_p, lse, expectation);
  expect_soft_cap(op, soft_cap);
  const OnDevice on_device(running);
  dispatch_table<__half, __nv_bfloat16>(op, lm_head.scalar_type(), [&](auto row, auto sum) {
    using Row = decltype(row);
    using Sum = decltype(sum);
    const Finish<Row, Sum> arguments = {const_data<Sum>(running),
                                        const_data<Row>(lm_head),
                                        lm_head.stride(0),
                                        lm_head.stride(1),
                                        const_data<int64_t>(target_ids),
                                        target_ids.size(0),
                                        lm_head.size(0),
                                        lm_head.size(1),
                                        static_cast<Sum>(logit_scale),
                                        cap_or_none<Sum>(soft_cap),
                                        data<Sum>(log_p),
                                        data<Sum>(lse),
                                        expectation ? data<Sum>(*expectation) : nullptr};
    check_cuda(op, launch_token_log_likelihood_finish(arguments, on_device.stream));
  });
}

void chunk_backward(Tensor logits, std::optional<Tensor> bias, Tensor target_ids, int64_t first, double logit_scale,
                    std::optional<double> soft_cap, Tensor lse, Tensor grad, ScalarType kept) {
  constexpr auto op = "token_log_likelihood_chunk_backward";
  make_contiguous({&target_ids, &lse, &grad});
  make_contiguous(bias);
  check_token_log_likelihood_chunk_backward(logits, bias, target_ids, lse, grad, kept);
  expect_soft_cap(op, soft_cap);
  const OnDevice on_device(logits);
  dispatch_table<__half, __nv_bfloat16>(op, kept, [&](auto tag, auto sum) {
    using Kept = decltype(tag);
    using Sum = decltype(sum);
    check_cuda(op, launch_token_log_likelihood_chunk_backward<Kept>(
                       make_chunk<Sum>(logits, bias, target_ids, first, logit_scale, soft_cap), const_data<Sum>(lse),
                       const_data<Sum>(grad), on_device.stream));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) {
  m.impl("token_log_likelihood_chunk", TORCH_BOX(&chunk));
  m.impl("token_log_likelihood_finish", TORCH_BOX(&finish));
  m.impl("token_log_likelihood_chunk_backward", TORCH_BOX(&chunk_backward));
}

}  // namespace
}  // namespace qpeft
