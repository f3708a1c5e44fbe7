// Root-mean-square norm, as the layers of Llama, Qwen, Mistral and others begin, and its gradient.
//   out = weight * round(x * scale),   scale = 1 / sqrt(mean of x^2 + eps), which is kept for the gradient
//   Parallel over   rows
//   Memory traffic  a row is read twice, the second time from the first cache, and written once
//   Precision       float32; of bfloat16, the quotient and the product are rounded, as these models round them; a gradient once
//   Deterministic   yes on one processor: lanes are added in a fixed order; a row does not depend on the others
#include "cpu/common.h"
#include "cpu/layer_checks.h"
#include "cpu/layer_kernels.h"

namespace qpeft {
namespace {

int64_t grain(int64_t D) { return (1 << 15) / (D + 1) + 1; }

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, double eps) {
  make_rows_contiguous({&x});
  make_contiguous({&weight});
  check_rms_norm("rms_norm", x, weight);
  const int64_t N = x.size(0), D = x.size(1);
  Tensor out = torch::stable::new_empty(x, {N, D});
  Tensor scale = torch::stable::new_empty(x, {N}, ScalarType::Float);
  dispatch_row(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(N, grain(D), [&](int64_t begin, int64_t end) {
      layer_kernels<T>().rms_norm(const_data<T>(x), x.stride(0), const_data<T>(weight), static_cast<float>(eps), begin,
                                  end, D, data<T>(out), data<float>(scale));
    });
  });
  return {out, scale};
}

Tensor backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) {
  constexpr auto op = "rms_norm_backward";
  make_rows_contiguous({&x});
  make_contiguous({&grad, &weight, &scale});
  check_rms_norm(op, x, weight);
  const int64_t N = x.size(0), D = x.size(1);
  expect(op, "grad", grad, {N, D}, x.scalar_type());
  expect(op, "scale", scale, {N}, ScalarType::Float);
  Tensor grad_x = torch::stable::new_empty(x, {N, D});
  dispatch_row(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(N, grain(D), [&](int64_t begin, int64_t end) {
      layer_kernels<T>().rms_norm_backward(const_data<T>(grad), const_data<T>(x), x.stride(0), const_data<T>(weight),
                                           const_data<float>(scale), begin, end, D, data<T>(grad_x));
    });
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&forward));
  m.impl("rms_norm_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace qpeft
