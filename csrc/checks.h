// The checks that memory safety needs, and no more: one function per primitive, which both devices call before they take a
// pointer. Messages for users are in qpeft_ext/ops/*.py; the stable ABI can only raise RuntimeError.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace qpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shape (-1: any size), dtype, and a contiguous layout; with free_row_stride only the last stride must be 1.
inline void expect(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> shape,
                   ScalarType dtype, bool free_row_stride = false) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(shape.size()), op, ": ", name, " must have ", shape.size(),
                  " dimensions, got ", x.dim());
  int64_t axis = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(size < 0 || x.size(axis) == size, op, ": ", name, " must have size ", size, " in dimension ", axis,
                    ", got ", x.size(axis));
    ++axis;
  }
  if (x.numel() == 0) return;
  if (free_row_stride) {
    STD_TORCH_CHECK(x.size(axis - 1) == 1 || x.stride(axis - 1) == 1, op, ": ", name, " must have last stride 1");
    STD_TORCH_CHECK(x.dim() < 2 || x.size(0) == 1 || x.stride(0) >= x.size(axis - 1), op, ": rows of ", name,
                    " overlap");
  } else {
    STD_TORCH_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
  }
}

// A reshape or a slice of sizes of 1 may be a view with other strides. Kernels read their inputs in order, so such a view is
// copied here, whatever its shape. What a kernel writes is the caller's memory: there `expect` raises.
inline void make_contiguous(std::initializer_list<Tensor*> inputs) {
  for (Tensor* x : inputs)
    if (!x->is_contiguous()) *x = torch::stable::contiguous(*x);
}

inline void make_contiguous(std::optional<Tensor>& input) {
  if (input) make_contiguous({&*input});
}

// The same for matrices whose row stride is free: columns side by side, rows that do not overlap.
inline void make_rows_contiguous(std::initializer_list<Tensor*> inputs) {
  for (Tensor* x : inputs) {
    if (x->dim() != 2 || x->numel() == 0) continue;
    const int64_t rows = x->size(0), columns = x->size(1);
    if ((columns > 1 && x->stride(1) != 1) || (rows > 1 && x->stride(0) < columns)) *x = torch::stable::contiguous(*x);
  }
}

inline void expect_same_device(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other->device() == first.device(), op, ": all tensors must be on one device");
}

// The dtype of sums: float64 stays, everything else is float32.
inline ScalarType sum_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void expect_sum_dtype(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op, ": ", name,
                  " must be float32 or float64");
}

inline void check_document_rows_distinct(const Tensor& document_ids, const Tensor& document_mask,
                                         const Tensor& group_index, int64_t num_groups, int64_t num_rows) {
  constexpr auto op = "document_rows_distinct";
  expect(op, "document_ids", document_ids, {-1, -1}, ScalarType::Long);
  expect(op, "document_mask", document_mask, {document_ids.size(0), document_ids.size(1)}, ScalarType::Bool);
  expect(op, "group_index", group_index, {document_ids.size(0)}, ScalarType::Long);
  expect_same_device(op, document_ids, {&document_mask, &group_index});
  for (const int64_t size : {num_groups, num_rows, document_ids.numel()})
    STD_TORCH_CHECK(size >= 0 && size <= INT32_MAX, op, ": sizes must fit in 31 bits, got ", size);
}

// block_dtype: what the device gathers into (the sum dtype on the CPU, the table's dtype on CUDA).
inline void check_document_rows_gather(const Tensor& table, const Tensor& rows, const Tensor& block,
                                       const std::optional<Tensor>& inverse_norms, ScalarType block_dtype) {
  constexpr auto op = "document_rows_gather";
  expect(op, "table", table, {-1, -1}, table.scalar_type(), /*free_row_stride=*/true);
  expect(op, "rows", rows, {-1}, ScalarType::Long);
  expect(op, "block", block, {rows.size(0), table.size(1)}, block_dtype, /*free_row_stride=*/true);
  expect_same_device(op, table, {&rows, &block});
  if (inverse_norms) {
    expect(op, "inverse_norms", *inverse_norms, {rows.size(0)}, sum_dtype(table.scalar_type()));
    expect_same_device(op, table, {&*inverse_norms});
  }
}

// Everything contiguous but the table, whose row stride is free.
inline void check_similarity_topk(const Tensor& query_embeds, const Tensor& query_mask, const Tensor& table,
                                  const Tensor& document_ids, const Tensor& document_mask, const Tensor& query_index,
                                  int64_t k) {
  constexpr auto op = "similarity_topk";
  expect(op, "table", table, {-1, -1}, table.scalar_type(), /*free_row_stride=*/true);
  expect(op, "query_embeds", query_embeds, {-1, -1, table.size(1)}, table.scalar_type());
  expect(op, "query_mask", query_mask, {query_embeds.size(0), query_embeds.size(1)}, ScalarType::Bool);
  check_document_rows_distinct(document_ids, document_mask, query_index, query_embeds.size(0), table.size(0));
  expect_same_device(op, table, {&query_embeds, &query_mask, &document_ids});
  STD_TORCH_CHECK(query_embeds.size(1) > 0, op, ": every query needs a token");
  STD_TORCH_CHECK(query_embeds.size(0) > 0 || query_index.size(0) == 0, op, ": query_index points to no query");
  STD_TORCH_CHECK(query_mask.numel() <= INT32_MAX && k <= INT32_MAX, op, ": sizes must fit in 31 bits");
  STD_TORCH_CHECK(k >= 1, op, ": k must be at least 1, got ", k);
}

inline void check_similarity_topk_reduce(const Tensor& similarity, const std::optional<Tensor>& inverse_norms,
                                         const Tensor& query_mask, const Tensor& best, const Tensor& query_positions) {
  constexpr auto op = "similarity_topk_reduce";
  expect_sum_dtype(op, "similarity", similarity);
  expect(op, "query_mask", query_mask, {-1, -1}, ScalarType::Bool);
  const int64_t n = similarity.size(0), queries = query_mask.size(0);
  expect(op, "similarity", similarity, {-1, query_mask.numel()}, similarity.scalar_type());
  expect(op, "best", best, {queries, n}, similarity.scalar_type(), /*free_row_stride=*/true);
  expect(op, "query_positions", query_positions, {queries, n}, ScalarType::Int, /*free_row_stride=*/true);
  expect_same_device(op, similarity, {&query_mask, &best, &query_positions});
  if (inverse_norms) {
    expect(op, "inverse_norms", *inverse_norms, {n}, similarity.scalar_type());
    expect_same_device(op, similarity, {&*inverse_norms});
  }
}

// The values of best_row and slots are not checked here: they come from document_rows_distinct. The kernel treats slots outside
// [0, U) and rows outside [0, M) as padding, so that a direct call cannot read out of bounds.
inline void check_similarity_topk_select(const Tensor& best, const Tensor& best_positions, const Tensor& best_row,
                                         const std::optional<Tensor>& inverse_norms, const Tensor& ids,
                                         const Tensor& slots, int64_t k) {
  constexpr auto op = "similarity_topk_select";
  expect_sum_dtype(op, "best", best);
  expect(op, "best", best, {-1, -1}, best.scalar_type());
  expect(op, "best_positions", best_positions, {best.size(0), best.size(1)}, ScalarType::Int);
  expect(op, "best_row", best_row, {-1}, ScalarType::Long);
  expect(op, "ids", ids, {best_row.size(0), -1}, ScalarType::Long);
  expect(op, "slots", slots, {best_row.size(0), ids.size(1)}, ScalarType::Int);
  expect_same_device(op, best, {&best_positions, &best_row, &ids, &slots});
  if (inverse_norms) {
    expect(op, "inverse_norms", *inverse_norms, {best.size(1)}, best.scalar_type());
    expect_same_device(op, best, {&*inverse_norms});
  }
  STD_TORCH_CHECK(k >= 1, op, ": k must be at least 1, got ", k);
}

// The values of rows and offsets: the CPU looks at them, CUDA traps at a row and trusts offsets.
inline void check_weighted_rows(const Tensor& source, const Tensor& rows, const std::optional<Tensor>& weights,
                                const Tensor& offsets, const Tensor& out) {
  constexpr auto op = "weighted_rows";
  expect(op, "source", source, {-1, -1}, source.scalar_type(), /*free_row_stride=*/true);
  expect(op, "rows", rows, {-1}, ScalarType::Long);
  expect(op, "offsets", offsets, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(offsets.size(0) >= 1, op, ": offsets must have at least one element");
  expect(op, "out", out, {offsets.size(0) - 1, source.size(1)}, sum_dtype(source.scalar_type()));
  expect_same_device(op, source, {&rows, &offsets, &out});
  if (weights) {
    expect(op, "weights", *weights, {rows.size(0)}, sum_dtype(source.scalar_type()));
    expect_same_device(op, source, {&*weights});
  }
}

// As above: slots outside [first_slot, first_slot + U) are padding.
inline void check_clue_attention_lse(const char* op, const Tensor& scores, const Tensor& slots, const Tensor& counts,
                                     const Tensor& lse) {
  expect_sum_dtype(op, "scores", scores);
  expect(op, "scores", scores, {-1, -1}, scores.scalar_type());
  expect(op, "slots", slots, {-1, -1}, ScalarType::Int);
  expect(op, "counts", counts, {slots.size(0), slots.size(1)}, ScalarType::Int);
  expect(op, "lse", lse, {slots.size(0), scores.size(1)}, scores.scalar_type());
  expect_same_device(op, scores, {&slots, &counts, &lse});
}

inline void check_clue_attention_weights(const Tensor& scores, const Tensor& slots, const Tensor& counts,
                                         const Tensor& lse, const Tensor& weights, ScalarType weights_dtype) {
  constexpr auto op = "clue_attention_weights";
  check_clue_attention_lse(op, scores, slots, counts, lse);
  expect(op, "weights", weights, {slots.size(0), slots.size(1), scores.size(1)}, weights_dtype);
  expect_same_device(op, scores, {&weights});
}

inline void check_clue_attention_softmax_backward(const Tensor& weights, const Tensor& slots,
                                                  const Tensor& grad_weights, ScalarType weights_dtype) {
  constexpr auto op = "clue_attention_softmax_backward";
  expect_sum_dtype(op, "grad_weights", grad_weights);
  expect(op, "slots", slots, {-1, -1}, ScalarType::Int);
  expect(op, "weights", weights, {slots.size(0), slots.size(1), -1}, weights_dtype);
  expect(op, "grad_weights", grad_weights, {slots.size(0), slots.size(1), weights.size(2)}, grad_weights.scalar_type());
  expect_same_device(op, weights, {&grad_weights, &slots});
}

inline void expect_sums_of(const char* op, const char* name, const Tensor& x, const char* of_name, const Tensor& of) {
  STD_TORCH_CHECK(x.scalar_type() == sum_dtype(of.scalar_type()), op, ": ", name, " must have the dtype of sums of ",
                  of_name);
}

// What both gathered products have; the values of rows, offsets and lengths are not checked here: kernels trap.
inline void check_clue_attention_lists(const char* op, const Tensor& table, const Tensor& rows,
                                       const std::optional<Tensor>& offsets, const std::optional<Tensor>& lengths) {
  expect(op, "table", table, {-1, -1}, table.scalar_type(), /*free_row_stride=*/true);
  expect(op, "rows", rows, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(table.size(0) <= INT32_MAX && table.size(1) <= INT32_MAX, op, ": sizes of table must fit in 31 bits");
  STD_TORCH_CHECK(offsets.has_value() != lengths.has_value(), op, ": either offsets or lengths");
  const Tensor& of_lists = offsets ? *offsets : *lengths;
  expect(op, offsets ? "offsets" : "lengths", of_lists, {-1}, ScalarType::Long);
  STD_TORCH_CHECK(!offsets || offsets->size(0) > 0, op, ": offsets must have size [lists + 1]");
  STD_TORCH_CHECK(offsets || (lengths->size(0) == 0 ? rows.size(0) == 0 : rows.size(0) % lengths->size(0) == 0), op,
                  ": rows must have as many places for each list");
  expect_same_device(op, table, {&rows, &of_lists});
}

inline void check_clue_attention_products(const Tensor& table, const Tensor& rows, const std::optional<Tensor>& offsets,
                                          const std::optional<Tensor>& lengths, const Tensor& dense,
                                          const Tensor& products) {
  constexpr auto op = "clue_attention_products";
  check_clue_attention_lists(op, table, rows, offsets, lengths);
  const int64_t lists = offsets ? offsets->size(0) - 1 : lengths->size(0);
  expect(op, "dense", dense, {lists, -1, table.size(1)}, table.scalar_type());
  expect(op, "products", products, {rows.size(0), dense.size(1)}, sum_dtype(table.scalar_type()));
  expect_same_device(op, table, {&dense, &products});
}

inline void check_clue_attention_weighted_sums(const Tensor& table, const Tensor& rows,
                                               const std::optional<Tensor>& offsets,
                                               const std::optional<Tensor>& lengths, const Tensor& weights,
                                               int64_t heads, const Tensor& sums) {
  constexpr auto op = "clue_attention_weighted_sums";
  check_clue_attention_lists(op, table, rows, offsets, lengths);
  expect(op, "weights", weights, {rows.size(0), -1}, table.scalar_type());
  STD_TORCH_CHECK(heads >= 1 && weights.size(1) % heads == 0 && table.size(1) % heads == 0, op,
                  ": heads must divide the columns of weights and of table");
  const int64_t lists = offsets ? offsets->size(0) - 1 : lengths->size(0);
  const ScalarType dtype =
      sums.scalar_type() == table.scalar_type() ? table.scalar_type() : sum_dtype(table.scalar_type());
  expect(op, "sums", sums, {lists, weights.size(1) / heads, table.size(1)}, dtype);
  expect_same_device(op, table, {&weights, &sums});
}

inline void expect_soft_cap(const char* op, std::optional<double> soft_cap) {
  STD_TORCH_CHECK(!soft_cap || *soft_cap > 0, op, ": soft_cap must be positive or None, got ", *soft_cap);
}

// kept: the dtype of what replaces the logits.
inline void check_chunk(const char* op, const Tensor& logits, const std::optional<Tensor>& bias,
                        const Tensor& target_ids, ScalarType kept) {
  expect_sum_dtype(op, "logits", logits);
  expect(op, "logits", logits, {-1, -1}, logits.scalar_type(), /*free_row_stride=*/true);
  expect(op, "target_ids", target_ids, {logits.size(0)}, ScalarType::Long);
  expect_same_device(op, logits, {&target_ids});
  if (bias) {
    expect(op, "bias", *bias, {logits.size(1)}, logits.scalar_type());
    expect_same_device(op, logits, {&*bias});
  }
  const bool narrow = kept == ScalarType::Half || kept == ScalarType::BFloat16;
  STD_TORCH_CHECK(kept == logits.scalar_type() || (narrow && logits.scalar_type() == ScalarType::Float), op,
                  ": kept must be the dtype of logits, or a 16-bit one over float32");
}

inline void check_token_log_likelihood_chunk(const Tensor& logits, const std::optional<Tensor>& bias,
                                             const Tensor& target_ids, const Tensor& running,
                                             const std::optional<Tensor>& expectation, ScalarType kept) {
  constexpr auto op = "token_log_likelihood_chunk";
  check_chunk(op, logits, bias, target_ids, kept);
  expect(op, "running", running, {3, logits.size(0)}, logits.scalar_type());
  expect_same_device(op, logits, {&running});
  if (expectation) {
    expect(op, "expectation", *expectation, {logits.size(0), -1}, logits.scalar_type());
    expect_same_device(op, logits, {&*expectation});
  }
}

inline void check_token_log_likelihood_chunk_backward(const Tensor& logits, const std::optional<Tensor>& bias,
                                                      const Tensor& target_ids, const Tensor& lse, const Tensor& grad,
                                                      ScalarType kept) {
  constexpr auto op = "token_log_likelihood_chunk_backward";
  check_chunk(op, logits, bias, target_ids, kept);
  expect(op, "lse", lse, {logits.size(0)}, logits.scalar_type());
  expect(op, "grad", grad, {logits.size(0)}, logits.scalar_type());
  expect_same_device(op, logits, {&lse, &grad});
}

inline void check_bfloat16_products(const Tensor& a, const Tensor& b, const Tensor& out) {
  constexpr auto op = "bfloat16_products";
  expect(op, "a", a, {-1, -1}, ScalarType::BFloat16, true);
  expect(op, "b", b, {-1, a.size(1)}, ScalarType::BFloat16, true);
  expect(op, "out", out, {a.size(0), b.size(0)}, ScalarType::Float, true);
  STD_TORCH_CHECK(a.size(1) % 2 == 0, op, ": the rows of a and b must have an even number of columns, got ", a.size(1));
}

inline void check_bfloat16_add_product(const Tensor& total, const Tensor& a, const Tensor& b) {
  constexpr auto op = "bfloat16_add_product";
  expect(op, "a", a, {-1, -1}, ScalarType::BFloat16, true);
  expect(op, "b", b, {a.size(1), -1}, ScalarType::BFloat16, true);
  expect(op, "total", total, {a.size(0), b.size(1)}, ScalarType::Float, true);
}

// Strides are free but the last ones. mask may be one for all items.
inline void check_bfloat16_attention(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& mask) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && mask.dim() == 4, op,
                  ": four dimensions each");
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2), D = query.size(3), T = key.size(2);
  for (const Tensor* x : {&query, &key, &value}) {
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::BFloat16, op, ": query, key and value must be bfloat16");
    STD_TORCH_CHECK(x->size(0) == B && x->size(3) == D, op,
                    ": query, key and value must agree in their first and last size");
    STD_TORCH_CHECK(x->numel() == 0 || x->stride(3) == 1, op, ": query, key and value must have last stride 1");
  }
  STD_TORCH_CHECK(D % 32 == 0, op, ": the width of a head must be a multiple of 32, got ", D);
  STD_TORCH_CHECK(key.size(1) == value.size(1) && key.size(2) == value.size(2), op,
                  ": key and value must have one shape");
  STD_TORCH_CHECK(key.size(1) > 0 && H % key.size(1) == 0, op, ": heads of keys must divide heads of queries");
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && (mask.size(0) == B || mask.size(0) == 1) &&
                      mask.size(1) == 1 && mask.size(2) == L && mask.size(3) == T &&
                      (mask.numel() == 0 || T == 1 || mask.stride(3) == 1),
                  op, ": mask must be bool [B or 1, 1, L, T] with last stride 1");
}

inline void check_token_log_likelihood_finish(const Tensor& running, const Tensor& lm_head, const Tensor& target_ids,
                                              const Tensor& log_p, const Tensor& lse,
                                              const std::optional<Tensor>& expectation) {
  constexpr auto op = "token_log_likelihood_finish";
  const auto dtype = sum_dtype(lm_head.scalar_type());
  const int64_t N = target_ids.size(0);
  STD_TORCH_CHECK(lm_head.dim() == 2, op, ": lm_head must have 2 dimensions, got ", lm_head.dim());
  expect(op, "target_ids", target_ids, {-1}, ScalarType::Long);
  expect(op, "running", running, {3, N}, dtype);
  expect(op, "log_p", log_p, {N}, dtype);
  expect(op, "lse", lse, {N}, dtype);
  expect_same_device(op, running, {&lm_head, &target_ids, &log_p, &lse});
  if (expectation) {
    expect(op, "expectation", *expectation, {N, lm_head.size(1)}, dtype);
    expect_same_device(op, running, {&*expectation});
  }
}

}  // namespace qpeft
