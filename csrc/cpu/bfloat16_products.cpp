// Products of bfloat16 matrices with float32 sums, as a GPU has them; torch's, on the CPU, round the result to bfloat16.
//   bfloat16_products      out = a b^T     parallel over words; a is packed once
//   bfloat16_add_product   total += a b    parallel over columns and rows; b is packed by tiles of 64 columns
//   Instructions    AMX or AVX512-BF16
//   Precision       float32 sums of exact products, without denormals
//   Deterministic   yes: each sum has one order
#include "cpu/bfloat16_products.h"

#include "cpu/common.h"
#include "cpu/instructions.h"

namespace qpeft {
#if defined(__x86_64__) && defined(__gnu_linux__)

// Without tiles Intel's processors multiply float32 faster: Llama-2-7B's head takes a Xeon 1,131 ms in float32, 1,888 by
// VDPBF16PS and 220 with tiles (1,600 rows, 2 threads); an AMD EPYC takes 2,068 in float32 and 1,031 by VDPBF16PS.
int64_t bfloat16_instructions() {
  static const int64_t found = [] {
    const bool vectors = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl");
    if (vectors && may_use_tiles(kTilesOfBFloat16)) return kInstructionsAmx;
    return vectors && __builtin_cpu_is("amd") && instructions_cap() != Cap::kAvx2 ? kInstructionsAvx512Bf16
                                                                                  : kInstructionsNone;
  }();
  return found;
}

namespace {

const BFloat16Kernels& kernels(const char* op, bool tiles) {
  const int64_t has = bfloat16_instructions();
  STD_TORCH_CHECK(has != kInstructionsNone, op, ": this processor has no products of bfloat16");
  return has == kInstructionsAmx && tiles ? kAmxKernels : kAvx512Bf16Kernels;
}

void products(Tensor a, Tensor b, Tensor out, bool tiles) {
  constexpr auto op = "bfloat16_products";
  make_rows_contiguous({&a, &b});
  check_bfloat16_products(a, b, out);
  const BFloat16Kernels& by = kernels(op, tiles);
  const int64_t N = a.size(0), C = b.size(0), D = a.size(1), pairs = D / 2;
  if (N == 0 || C == 0) return;
  const int64_t packed_pairs = round_up(pairs, by.pairs_step);
  Tensor packed = torch::stable::new_empty(a, {round_up(N, kVector), 2 * packed_pairs});
  auto* packed_at = data<uint32_t>(packed);
  parallel((N + kVector - 1) / kVector, 4096 / (pairs + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin * kVector; n < std::min(end * kVector, N); n += kVector)
      by.pack_vector(words_of(a) + n * a.stride(0), a.stride(0), std::min(kVector, N - n), pairs, packed_pairs,
                     packed_at + n * packed_pairs);
  });
  auto* to = data<float>(out);
  const int64_t groups = (C + by.words - 1) / by.words;
  parallel(groups, (1 << 20) / (N * std::max<int64_t>(D, 1) * by.words) + 1, [&](int64_t begin, int64_t end) {
    by.products_of_words(packed_at, N, pairs, words_of(b), b.stride(0), begin * by.words, std::min(end * by.words, C),
                         to, out.stride(0));
  });
}

void add_product(Tensor total, Tensor a, Tensor b, bool tiles) {
  constexpr auto op = "bfloat16_add_product";
  make_rows_contiguous({&a, &b});
  check_bfloat16_add_product(total, a, b);
  const BFloat16Kernels& by = kernels(op, tiles);
  const int64_t N = a.size(0), C = a.size(1), D = b.size(1);
  if (N == 0 || C == 0 || D == 0) return;
  const int64_t tiles_of_b = (D + kColumns - 1) / kColumns, blocks = (N + by.rows - 1) / by.rows;
  auto* to = data<float>(total);
  parallel(tiles_of_b * blocks, (1 << 20) / (std::min(N, by.rows) * C * kColumns) + 1,
           [&](int64_t first, int64_t last) {
             for (int64_t at = first, count; at < last; at += count) {
               const int64_t n = at / tiles_of_b * by.rows, tile = at % tiles_of_b, d = tile * kColumns;
               count = std::min({by.tiles, last - at, tiles_of_b - tile});
               by.add_product_of_columns(words_of(a), a.stride(0), n, std::min(n + by.rows, N), C, words_of(b) + d,
                                         b.stride(0), std::min(count * kColumns, D - d), to + d, total.stride(0));
             }
           });
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) {
  m.impl("bfloat16_products", TORCH_BOX(&products));
  m.impl("bfloat16_add_product", TORCH_BOX(&add_product));
}

#else

int64_t bfloat16_instructions() { return kInstructionsNone; }

namespace {

#endif

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CompositeExplicitAutograd, m) {
  m.impl("bfloat16_instructions", TORCH_BOX(&bfloat16_instructions));
}

}  // namespace
}  // namespace qpeft
