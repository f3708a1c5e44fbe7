// Sums of weighted rows by segments: CUDA.
#include "glue.h"

namespace qpeft {
namespace {

void weighted_rows(Tensor source, Tensor rows, std::optional<Tensor> weights, Tensor offsets, bool accumulate,
                   Tensor out) {
  constexpr auto op = "weighted_rows";
  make_rows_contiguous({&source});
  make_contiguous({&rows, &offsets});
  make_contiguous(weights);
  check_weighted_rows(source, rows, weights, offsets, out);
  const OnDevice on_device(source);
  const int64_t G = offsets.size(0) - 1, D = source.size(1);
  dispatch_table<__half, __nv_bfloat16>(op, source.scalar_type(), [&](auto row_tag, auto sum_tag) {
    using Row = decltype(row_tag);
    using Sum = decltype(sum_tag);
    check_cuda(op, launch_weighted_rows(const_data<Row>(source), source.stride(0), source.size(0), D,
                                        const_data<int64_t>(rows), const_data<Sum>(weights),
                                        const_data<int64_t>(offsets), G, accumulate, data<Sum>(out), on_device.stream));
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CUDA, m) { m.impl("weighted_rows", TORCH_BOX(&weighted_rows)); }

}  // namespace
}  // namespace qpeft
