// The keys (or values) that each pair attends to: its document's, left-padded with zeros, and those of its suffix.
//   Parallel over   pairs and heads
//   Memory traffic  each number is read once and written once
//   Precision       numbers are copied
//   Deterministic   yes
#include <vector>

#include "cpu/common.h"

namespace qpeft {
namespace {

void check(const std::vector<Tensor>& prefixes, const std::vector<int64_t>& rows, const Tensor& suffixes,
           int64_t slots) {
  constexpr auto op = "joined_prefixes";
  STD_TORCH_CHECK(suffixes.dim() == 4, op, ": suffixes must have 4 dimensions, got ", suffixes.dim());
  STD_TORCH_CHECK(static_cast<int64_t>(rows.size()) == suffixes.size(0), op, ": rows must have ", suffixes.size(0),
                  " numbers, got ", rows.size());
  STD_TORCH_CHECK(slots >= 0, op, ": slots must not be negative, got ", slots);
  for (const Tensor& prefix : prefixes) {
    STD_TORCH_CHECK(prefix.scalar_type() == suffixes.scalar_type(), op, ": a prefix has the wrong dtype");
    STD_TORCH_CHECK(prefix.device() == suffixes.device(), op, ": all tensors must be on one device");
    STD_TORCH_CHECK(prefix.dim() == 4 && prefix.size(0) == 1 && prefix.size(1) == suffixes.size(1) &&
                        prefix.size(2) <= slots && prefix.size(3) == suffixes.size(3) && prefix.is_contiguous(),
                    op, ": each prefix must be contiguous [1, ", suffixes.size(1), ", at most ", slots, ", ",
                    suffixes.size(3), "]");
  }
  for (const int64_t row : rows)
    STD_TORCH_CHECK(row >= 0 && row < static_cast<int64_t>(prefixes.size()), op, ": rows must be below ",
                    prefixes.size(), ", got ", row);
}

Tensor joined(std::vector<Tensor> prefixes, std::vector<int64_t> rows, Tensor suffixes, int64_t slots) {
  check(prefixes, rows, suffixes, slots);
  if (suffixes.numel() > 0 && suffixes.stride(3) != 1) suffixes = torch::stable::contiguous(suffixes);
  const int64_t B = suffixes.size(0), H = suffixes.size(1), L = suffixes.size(2), D = suffixes.size(3);
  const int64_t element = static_cast<int64_t>(suffixes.element_size()), bytes = D * element, length = slots + L;
  Tensor out = torch::stable::new_empty(suffixes, {B, H, length, D});
  auto* to = static_cast<char*>(out.mutable_data_ptr());
  const auto* own = static_cast<const char*>(suffixes.const_data_ptr());
  const int64_t batch = suffixes.stride(0) * element, head = suffixes.stride(1) * element,
                token = suffixes.stride(2) * element;
  std::vector<const char*> from(prefixes.size());
  std::vector<int64_t> lengths(prefixes.size());
  for (size_t i = 0; i < prefixes.size(); ++i) {
    from[i] = static_cast<const char*>(prefixes[i].const_data_ptr());
    lengths[i] = prefixes[i].size(2);
  }
  parallel(B * H, (1 << 16) / (length * bytes + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / H, h = i % H, P = lengths[rows[b]];
      char* place = to + i * length * bytes;
      std::memset(place, 0, (slots - P) * bytes);  // masked, but NaN times zero would still be NaN
      place += (slots - P) * bytes;
      if (P > 0) std::memcpy(place, from[rows[b]] + h * P * bytes, P * bytes);
      place += P * bytes;
      for (int64_t l = 0; l < L; ++l) std::memcpy(place + l * bytes, own + b * batch + h * head + l * token, bytes);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) { m.impl("joined_prefixes", TORCH_BOX(&joined)); }

}  // namespace
}  // namespace qpeft
