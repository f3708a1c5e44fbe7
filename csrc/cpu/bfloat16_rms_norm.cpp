// Root-mean-square norm of bfloat16 rows, as the layers of Llama, Qwen, Mistral and others begin.
//   Threads         parallel over rows
//   Precision       float32 but for the two roundings that these models have; the gradient is rounded once
//   Deterministic   yes; a row does not depend on the others
//   Why             in torch a norm is six passes over memory and its gradient a dozen, most of them in float32: with AMX a sixth
//                   of a training step of an LM of 20 M parameters
#include "cpu/bfloat16_rms_norm.h"

#include "checks.h"
#include "cpu/bfloat16_products.h"
#include "cpu/common.h"

namespace qpeft {
namespace {

#if defined(__x86_64__) && defined(__gnu_linux__)

template <typename F>
void for_rows(const char* op, const Tensor& x, const F& f) {
  STD_TORCH_CHECK(bfloat16_instructions() != kInstructionsNone, op, ": this processor has no products of bfloat16");
  parallel(x.size(0), (1 << 15) / (x.size(1) + 1) + 1, f);
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, double eps) {
  constexpr auto op = "bfloat16_rms_norm";
  make_rows_contiguous({&x});
  make_contiguous({&weight});
  check_bfloat16_rms_norm(op, x, weight);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor scale = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Float);
  auto* to = data<uint16_t>(out);
  auto* scales = data<float>(scale);
  for_rows(op, x, [&](int64_t begin, int64_t end) {
    rms_norm_rows(words_of(x), x.stride(0), words_of(weight), static_cast<float>(eps), begin, end, x.size(1), to,
                  scales);
  });
  return {out, scale};
}

Tensor backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) {
  constexpr auto op = "bfloat16_rms_norm_backward";
  make_rows_contiguous({&x});
  make_contiguous({&grad, &weight, &scale});
  check_bfloat16_rms_norm(op, x, weight);
  expect(op, "grad", grad, {x.size(0), x.size(1)}, ScalarType::BFloat16);
  expect(op, "scale", scale, {x.size(0)}, ScalarType::Float);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  auto* to = data<uint16_t>(grad_x);
  const auto* scales = const_data<float>(scale);
  for_rows(op, x, [&](int64_t begin, int64_t end) {
    rms_norm_rows_backward(words_of(grad), words_of(x), x.stride(0), words_of(weight), scales, begin, end, x.size(1),
                           to);
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("bfloat16_rms_norm", TORCH_BOX(&forward));
  m.impl("bfloat16_rms_norm_backward", TORCH_BOX(&backward));
}

#endif

}  // namespace
}  // namespace qpeft
