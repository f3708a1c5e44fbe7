// Attention of few queries to many keys in bfloat16: a suffix that reads its document's prefix, or a prefix itself.
//   Threads         parallel over items and heads of keys; where these are too few, the forward pass over blocks of rows too
//   Precision       scores and sums in float32; weights are rounded to bfloat16, as torch's own kernel does
//   Deterministic   yes; an item does not depend on the others
//   Why             torch's kernel multiplies small blocks one by one: 60 to 150 GFLOP/s where a matrix product has 1,400
#include "cpu/bfloat16_attention.h"

#include <memory>

#include "checks.h"
#include "cpu/bfloat16_products.h"
#include "cpu/common.h"

namespace qpeft {
namespace {

#if defined(__x86_64__) && defined(__gnu_linux__)

struct Delete {
  void operator()(AttentionMemory* memory) const { delete_attention_memory(memory); }
};

// x [B, L, H, D] contiguous: the rows of item b from head h on
template <typename T>
HeadRows<T> heads_of(T* x, int64_t b, int64_t h, int64_t L, int64_t H, int64_t D) {
  return {x + (b * L * H + h) * D, D, H * D};
}

constexpr int64_t kRows = 64;  // of queries that are worth packing the keys for

struct Part {
  int64_t item, query_head;  // the first of the head's
  int64_t begin, end;  // rows
};

// f(head, part) for all heads of keys of all items
template <typename F>
void for_heads(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask,
               float scale, bool backward, const F& f) {
  STD_TORCH_CHECK(bfloat16_instructions() == kInstructionsAmx, op, ": this processor has no AMX");
  check_bfloat16_attention(op, query, key, value, mask);
  const int64_t B = query.size(0), heads = key.size(1), shared = query.size(1) / std::max<int64_t>(heads, 1);
  AttentionHead all{
      shared,         query.size(2), key.size(2),   query.size(3),   {nullptr, query.stride(1), query.stride(2)},
      nullptr,        nullptr,       key.stride(2), value.stride(2), nullptr,
      mask.stride(2), scale};
  if (all.L == 0 || all.D == 0) return;
  const int64_t mask_item = mask.size(0) == 1 ? 0 : mask.stride(0);
  const int64_t rows = shared * all.L, wanted = 2 * int64_t(torch::stable::get_num_threads());
  const int64_t parts =
      backward || B == 0 ? 1 : std::clamp<int64_t>(wanted / (B * heads), 1, (rows + kRows - 1) / kRows);
  const int64_t of_part = round_up((rows + parts - 1) / parts, kVector);
  parallel(B * heads * parts, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<AttentionMemory, Delete> memory(new_attention_memory(all, backward));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts / heads, h = i / parts % heads, first = std::min(i % parts * of_part, rows);
      AttentionHead head = all;
      head.query.at = words_of(query) + b * query.stride(0) + h * shared * query.stride(1);
      head.key = words_of(key) + b * key.stride(0) + h * key.stride(1);
      head.value = words_of(value) + b * value.stride(0) + h * value.stride(1);
      head.mask = const_data<bool>(mask) + b * mask_item;
      f(head, *memory, Part{b, h * shared, first, std::min(first + of_part, rows)});
    }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor query, const Tensor key, const Tensor value, const Tensor mask,
                                   double scale) {
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3);
  Tensor out = torch::stable::new_empty(query, {B, L, H, D});
  Tensor lse = torch::stable::new_empty(query, {B, H, L}, ScalarType::Float);
  auto* to = data<uint16_t>(out);
  auto* sums = data<float>(lse);
  for_heads("bfloat16_attention", query, key, value, mask, static_cast<float>(scale), false,
            [&](const AttentionHead& head, AttentionMemory& memory, const Part& part) {
              attend(head, part.begin, part.end, memory, heads_of(to, part.item, part.query_head, L, H, D),
                     sums + (part.item * H + part.query_head) * L);
            });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor out, Tensor lse, const Tensor query, const Tensor key,
                                            const Tensor value, const Tensor mask, double scale) {
  constexpr auto op = "bfloat16_attention_backward";
  make_contiguous({&grad, &out, &lse});
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3), T = key.size(2);
  expect(op, "grad", grad, {B, L, H, D}, ScalarType::BFloat16);
  expect(op, "out", out, {B, L, H, D}, ScalarType::BFloat16);
  expect(op, "lse", lse, {B, H, L}, ScalarType::Float);
  Tensor grad_query = torch::stable::new_empty(query, {B, L, H, D});
  Tensor grad_key = torch::stable::new_empty(key, {B, key.size(1), T, D});
  Tensor grad_value = torch::stable::new_empty(value, {B, key.size(1), T, D});
  auto *of_query = data<uint16_t>(grad_query), *of_key = data<uint16_t>(grad_key),
       *of_value = data<uint16_t>(grad_value);
  const auto* sums = const_data<float>(lse);
  for_heads(op, query, key, value, mask, static_cast<float>(scale), true,
            [&](const AttentionHead& head, AttentionMemory& memory, const Part& part) {
              const int64_t b = part.item, h = part.query_head;
              const int64_t of_keys = (b * (H / head.heads) + h / head.heads) * T * D;
              attend_backward(head, memory, heads_of(words_of(out), b, h, L, H, D), sums + (b * H + h) * L,
                              heads_of(words_of(grad), b, h, L, H, D), heads_of(of_query, b, h, L, H, D),
                              of_key + of_keys, of_value + of_keys);
            });
  return {grad_query, grad_key, grad_value};
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("bfloat16_attention", TORCH_BOX(&forward));
  m.impl("bfloat16_attention_backward", TORCH_BOX(&backward));
}

#endif

}  // namespace
}  // namespace qpeft
