// Linear layers with weights and activations in 8 bits (W8A8): out = x W^T + bias, with W in 8 bits and one scale for each output,
// and x rounded to 8 bits with one scale for each row, just before the product.
//   Outliers        a few inputs, chosen once, are multiplied in float32. The others are turned, 64 by 64, by a Hadamard matrix H,
//                   and so is W: (H x) (H W)^T = 64 x W^T, and a large number becomes 64 of an eighth of its size
//   Threads         over rows for the rounding, then over blocks of rows and groups of 32 outputs
//   Precision       sums are exact, in int32; one rounding of x, and of each output those of float32
//   Deterministic   yes; a row does not depend on the others
//   Why             VPDPBUSD multiplies four times as fast as float32, AMX ten times as fast. oneDNN's product has one scale for
//                   all rows, and compiles code for every number of them
#include "cpu/int8_linear.h"

#include <memory>
#include <optional>
#include <utility>

#include "checks.h"
#include "cpu/common.h"
#include "cpu/instructions.h"

namespace qpeft {
namespace {

constexpr int64_t kWhole = 96;  // rows: whole tiles, and whole twelves
constexpr int64_t kBlockBytes = 1 << 20;  // of rows that stay in the second cache while weights go by

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

void turn(float* x) {
  for (int64_t distance : {16, 32, 1, 2, 4, 8})  // the order of the vectors' code, which rounds alike
    for (int64_t i = 0; i < kInt8Turned; ++i)
      if (!(i & distance)) {
        const float first = x[i], second = x[i + distance];
        x[i] = first + second, x[i + distance] = first - second;
      }
}

void quantize_rows(const float* x, int64_t stride, int64_t begin, int64_t end, const Int8Layer& layer,
                   const Int8Rows& rows) {
  const int64_t D = layer.D, R = layer.R;
  const std::unique_ptr<float[]> row(new float[D]);
  for (int64_t n = begin; n < end; ++n) {
    std::memcpy(row.get(), x + n * stride, D * sizeof(float));
    for (int64_t i = 0; i < R; ++i) rows.exact[n * R + i] = std::exchange(row[layer.columns[i]], 0.0f);
    for (int64_t d = 0; d < D; d += kInt8Turned) turn(row.get() + d);
    float largest = 0;
    for (int64_t d = 0; d < D; ++d)
      if (!(std::fabs(row[d]) <= largest) && largest == largest) largest = std::fabs(row[d]);
    rows.scale[n] = largest / 127.0f;
    const float factor = largest > kInt8Tiny ? 127.0f / largest : 0.0f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int64_t d = 0; d < D; ++d) {
      const float rounded = row[d] * factor + kRound;
      int32_t bits;
      std::memcpy(&bits, &rounded, 4);
      rows.bytes[n * D + d] = static_cast<uint8_t>(bits + kInt8Zero);
    }
  }
}

void multiply(const Int8Rows& rows, int64_t n, const Int8Layer& layer, int64_t c, int64_t words, float* out) {
  const int64_t D = layer.D;
  for (int64_t r = 0; r < n; ++r)
    for (int64_t first = c; first < c + words; first += kInt8Words) {
      const int8_t* weight = layer.weight + first * D;
      int32_t sums[kInt8Words] = {};
      for (int64_t d = 0; d < D; d += 4)
        for (int w = 0; w < kInt8Words; ++w)
          for (int i = 0; i < 4; ++i) sums[w] += rows.bytes[r * D + d + i] * weight[d * kInt8Words + 4 * w + i];
      for (int w = 0; w < kInt8Words; ++w) {
        const int64_t at = first + w;
        float whole = layer.bias ? layer.bias[at] : 0.0f;
        for (int64_t i = 0; i < layer.R; ++i) whole += rows.exact[r * layer.R + i] * layer.exact[i * layer.C + at];
        const float sum = static_cast<float>(sums[w] - static_cast<int32_t>(kInt8Zero) * layer.sums[at]);
        out[r * layer.C + at - c] = sum * layer.scale[at] * rows.scale[r] + whole;
      }
    }
}

constexpr Int8Kernels kPortableKernels = {quantize_rows, multiply};

int64_t int8_instructions() {
  static const int64_t found = [] {
#if defined(__x86_64__) && defined(__gnu_linux__)
    const bool vectors = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (vectors && may_use_tiles(kTilesOfInt8)) return kInt8Amx;
    if (vectors && instructions_cap() != Cap::kAvx2) return kInt8Avx512Vnni;
#endif
    return kInt8Portable;
  }();
  return found;
}

const Int8Kernels& kernels([[maybe_unused]] int64_t instructions) {
#if defined(__x86_64__) && defined(__gnu_linux__)
  const int64_t some = std::min(instructions, int8_instructions());
  if (some == kInt8Amx) return kInt8AmxKernels;
  if (some == kInt8Avx512Vnni) return kInt8Avx512VnniKernels;
#endif
  return kPortableKernels;
}

// The blocks of weight: int8_linear.h.
void check(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& sums, const Tensor& columns,
           const Tensor& exact, const std::optional<Tensor>& bias) {
  constexpr auto op = "int8_linear";
  expect(op, "x", x, {-1, -1}, ScalarType::Float, true);
  const int64_t D = x.size(1);
  STD_TORCH_CHECK(D > 0 && D % 64 == 0 && D <= 1 << 16, op,
                  ": x must have a multiple of 64 columns, at most 65536, got ", D);
  expect(op, "weight", weight, {-1, D / 4, 16, 4}, ScalarType::Char);
  const int64_t C = 16 * weight.size(0);
  expect(op, "scale", scale, {C}, ScalarType::Float);
  expect(op, "sums", sums, {C}, ScalarType::Int);
  expect(op, "columns", columns, {-1}, ScalarType::Int);
  expect(op, "exact", exact, {columns.size(0), C}, ScalarType::Float);
  if (bias) expect(op, "bias", *bias, {C}, ScalarType::Float);
  for (int64_t i = 0; i < columns.size(0); ++i) {
    const int32_t column = const_data<int32_t>(columns)[i];
    STD_TORCH_CHECK(0 <= column && column < D, op, ": columns must be in [0, ", D, "), got ", column);
  }
}

Tensor int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor sums, Tensor columns, Tensor exact,
                   std::optional<Tensor> bias, int64_t instructions) {
  make_rows_contiguous({&x});
  make_contiguous({&weight, &scale, &sums, &columns, &exact});
  make_contiguous(bias);
  check(x, weight, scale, sums, columns, exact, bias);
  const Int8Kernels& by = kernels(instructions);
  const int64_t N = x.size(0), D = x.size(1), C = scale.size(0), R = columns.size(0);
  Tensor out = torch::stable::new_empty(x, {N, C});
  if (N == 0 || C == 0) return out;
  Tensor bytes = torch::stable::new_empty(x, {N + kInt8Padding, D}, ScalarType::Byte);
  Tensor row_scale = torch::stable::new_empty(x, {N}), row_exact = torch::stable::new_empty(x, {N, R});
  const Int8Rows rows = {data<uint8_t>(bytes), data<float>(row_scale), data<float>(row_exact)};
  const Int8Layer layer = {const_data<int8_t>(weight),
                           const_data<float>(scale),
                           const_data<int32_t>(sums),
                           bias ? const_data<float>(*bias) : nullptr,
                           const_data<int32_t>(columns),
                           const_data<float>(exact),
                           D,
                           C,
                           R};
  std::memset(rows.bytes + N * D, 0, kInt8Padding * D);  // no sums of these are stored, but they are read
  parallel(N, (1 << 15) / (D + 1) + 1, [&](int64_t begin, int64_t end) {
    by.quantize_rows(const_data<float>(x), x.stride(0), begin, end, layer, rows);
  });
  auto* to = data<float>(out);
  const int64_t most = std::max(kBlockBytes / D / kWhole * kWhole, kWhole);
  const int64_t each = ceil_div(N, ceil_div(N, most));  // equal blocks, so that threads have equal shares
  const int64_t some = ceil_div(each, kWhole) * kWhole;
  const int64_t groups = ceil_div(C, kInt8Group), blocks = ceil_div(N, some);
  parallel(blocks * groups, (1 << 22) / (std::min(N, some) * D * kInt8Group) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups * some, c = task % groups * kInt8Group;
      by.multiply(rows.from(n, layer), std::min(some, N - n), layer, c, std::min(kInt8Group, C - c), to + n * C + c);
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

STABLE_TORCH_LIBRARY_IMPL(qpeft_ext, CompositeExplicitAutograd, m) {
  m.impl("int8_instructions", TORCH_BOX(&int8_instructions));
}

}  // namespace
}  // namespace qpeft
