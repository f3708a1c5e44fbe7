// Products of bfloat16 matrices with float32 sums, as a GPU has them; torch's, on the CPU, round the result to bfloat16.
//   bfloat16_products      out = a b^T     parallel over words; a is packed once, b is read where it lies
//   bfloat16_add_product   total += a b    parallel over columns and rows; b is packed by tiles of 256 words and 64 columns
//   Precision       float32 sums of exact products, without denormals
//   Deterministic   yes: each sum has one order
#include "cpu/bfloat16_products.h"

#include "cpu/common.h"

namespace qpeft {
namespace {

bool has_bfloat16_products() {
#if defined(__x86_64__) && defined(__gnu_linux__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

#if defined(__x86_64__) && defined(__gnu_linux__)

void check_processor(const char* op) {
  STD_TORCH_CHECK(has_bfloat16_products(), op, ": this processor has no products of bfloat16");
}

const uint16_t* words_of(const Tensor& x) { return static_cast<const uint16_t*>(x.const_data_ptr()); }

void products(const Tensor a, const Tensor b, Tensor out) {
  constexpr auto op = "bfloat16_products";
  check_bfloat16_products(a, b, out);
  check_processor(op);
  const int64_t N = a.size(0), C = b.size(0), D = a.size(1), pairs = D / 2;
  if (N == 0 || C == 0) return;
  const int64_t vectors = (N + kVector - 1) / kVector;
  Tensor packed = torch::stable::new_empty(a, {vectors * kVector, D});
  auto* packed_at = static_cast<uint32_t*>(packed.mutable_data_ptr());
  pack_vectors(words_of(a), a.stride(0), N, pairs, packed_at);
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t tiles = (C + kWords - 1) / kWords;
  parallel(tiles, (1 << 20) / (N * std::max<int64_t>(D, 1) * kWords) + 1, [&](int64_t begin, int64_t end) {
    products_of_words(packed_at, N, pairs, words_of(b), b.stride(0), begin * kWords, std::min(end * kWords, C), to,
                      out.stride(0));
  });
}

void add_product(Tensor total, const Tensor a, const Tensor b) {
  constexpr auto op = "bfloat16_add_product";
  check_bfloat16_add_product(total, a, b);
  check_processor(op);
  const int64_t N = a.size(0), C = a.size(1), D = b.size(1);
  if (N == 0 || C == 0 || D == 0) return;
  constexpr int64_t kRows = 192;  // that share a packed tile
  const int64_t columns = (D + kColumns - 1) / kColumns, blocks = (N + kRows - 1) / kRows;
  auto* to = static_cast<float*>(total.mutable_data_ptr());
  parallel(columns * blocks, (1 << 20) / (std::min(N, kRows) * C * kColumns) + 1, [&](int64_t first, int64_t last) {
    alignas(64) uint32_t tile[kTilePairs * kColumns];
    for (int64_t at = first; at < last; ++at) {
      const int64_t d = at / blocks * kColumns, n = at % blocks * kRows;
      add_product_of_columns(words_of(a), a.stride(0), n, std::min(n + kRows, N), C, words_of(b) + d, b.stride(0),
                             std::min(kColumns, D - d), to + d, total.stride(0), tile);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("bfloat16_products", TORCH_BOX(&products));
  m.impl("bfloat16_add_product", TORCH_BOX(&add_product));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CompositeExplicitAutograd, m) {
  m.impl("has_bfloat16_products", TORCH_BOX(&has_bfloat16_products));
}

}  // namespace
}  // namespace qpeft
