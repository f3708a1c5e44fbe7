// Rotary embedding: the halves a, b of each head's vector become a cos - b sin and b cos + a sin, with the cos and sin of each
// half's own; inverse: the transposed map, which is the gradient.
//   Parallel over   tokens of a row of the batch, all heads of which share cos and sin
//   Memory traffic  each vector is read once and written once
//   Precision       float32; of bfloat16, both products and their sum are rounded, as torch rounds them
//   Deterministic   yes; a token does not depend on the others
#include "cpu/common.h"
#include "cpu/layer_checks.h"
#include "cpu/layer_kernels.h"

namespace qpeft {
namespace {

Tensor rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) {
  make_contiguous({&cos, &sin});
  check_rotary(x, cos, sin);
  const int64_t B = x.size(0), H = x.size(1), L = x.size(2), D = x.size(3);
  Tensor out = torch::stable::new_empty(x, {B, H, L, D});
  const HeadStrides from = {x.stride(0), x.stride(1), x.stride(2)}, to = {H * L * D, L * D, D};
  const int64_t table = cos.size(0) == 1 ? 0 : L * D;
  dispatch_row(x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    parallel(B * L, (1 << 14) / (H * D + 1) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin / L; b * L < end; ++b)
        layer_kernels<T>().rotary(const_data<T>(x) + b * from.batch, from, const_data<T>(cos) + b * table,
                                  const_data<T>(sin) + b * table, H, std::max(begin - b * L, int64_t{0}),
                                  std::min(end - b * L, L), D, inverse, data<T>(out) + b * to.batch, to);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary)); }

}  // namespace
}  // namespace qpeft
