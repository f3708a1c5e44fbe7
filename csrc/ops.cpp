// Every schema of qpeft_ext, once. Implementations register themselves: cpu/<op>.cpp, cuda/<op>.cpp.
//
// Letters: B query-document pairs, Q queries, T query tokens, S document tokens, K clues, D hidden size, H heads, V table
// rows, N likelihood rows; inside an operator G groups of pairs, U distinct rows of all groups, R = T * H, P pairs of one
// block, C words of one vocabulary chunk.
//
// Two kinds of operators:
//  * what users call (first block). Implemented in Python (qpeft_ext/ops/<op>.py) for both devices at once: loops over
//    blocks of rows, pairs or words, with the GEMMs of torch between the primitives.
//  * primitives (the rest): what differs by device. They have no autograd of their own, check only what memory safety needs
//    (checks.h), and write into buffers of the caller where they are called per block.
//
// "Compute dtype" below: on the CPU float32 (float64 when the table is float64); on CUDA float32 for everything that is
// summed, while gathered rows keep the table's dtype (the GEMM there takes bf16/fp16 and returns float32: aten::mm.dtype).
// The LM head is multiplied as it lies, on the CPU too where it has products of bfloat16.
// What a primitive fills is contiguous unless a stride is named; inputs with other strides are copied first. Sizes of zero are
// legal everywhere and do nothing.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(qpeft_ext, m) {
  // ---- operators -------------------------------------------------------------------------------------------------------
  // inverse_norms [B, k]: 1 / norm of the row of each clue (dot: 1; padding: any), so that a backward need not read it again.
  // On CUDA this is one function of C++, without Python between its launches.
  m.def(
      "similarity_topk(Tensor query_embeds, Tensor query_mask, Tensor table, Tensor document_ids, Tensor document_mask, "
      "Tensor query_index, SymInt k, str metric) "
      "-> (Tensor scores, Tensor clue_ids, Tensor query_positions, Tensor inverse_norms)");
  m.def(
      "similarity_topk_backward(Tensor grad_scores, Tensor scores, Tensor clue_ids, Tensor query_positions, "
      "Tensor inverse_norms, Tensor query_embeds, Tensor table, Tensor query_index, str metric, bool want_table) "
      "-> (Tensor grad_query_embeds, Tensor grad_table)");
  m.def(
      "clue_attention(Tensor query_embeds, Tensor query_mask, Tensor table, Tensor document_ids, Tensor document_mask, "
      "Tensor query_index, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_o, Tensor? b_q, Tensor? b_k, Tensor? b_v, "
      "Tensor? b_o, SymInt num_heads) -> Tensor");
  // The middle of clue_attention, between the projections of the query and of the output:
  //   absorbed [Q, T, H, D] (query head times W_k of the head, scaled) -> heads [B, T, D] (contexts times W_v, concatenated)
  //   and lse [B, T, H] in the dtype of sums, the log-sum-exp of the scores, from which the backward has the weights again
  m.def(
      "clue_attention_heads(Tensor absorbed, Tensor table, Tensor document_ids, Tensor document_mask, Tensor query_index, "
      "Tensor w_v) -> (Tensor heads, Tensor lse)");
  m.def(
      "clue_attention_heads_backward(Tensor grad_heads, Tensor lse, Tensor absorbed, Tensor table, Tensor document_ids, "
      "Tensor document_mask, Tensor query_index, Tensor w_v, bool want_table) "
      "-> (Tensor grad_absorbed, Tensor grad_w_v, Tensor grad_table)");
  m.def(
      "token_log_likelihood(Tensor hidden, Tensor lm_head, Tensor target_ids, Tensor? bias, float? soft_cap, "
      "float logit_scale, SymInt chunk_bytes, bool want_expectation) -> (Tensor log_p, Tensor lse, Tensor expectation)");
  m.def(
      "token_log_likelihood_backward(Tensor grad_log_p, Tensor lse, Tensor hidden, Tensor lm_head, Tensor target_ids, "
      "Tensor? bias, float? soft_cap, float logit_scale, SymInt chunk_bytes) -> (Tensor grad_lm_head, Tensor grad_bias)");

  // ---- primitives: document rows (shared by similarity_topk and clue_attention) -----------------------------------------
  // The distinct ids of each group of pairs, and of each document.
  //   document_ids [B, S] i64, document_mask [B, S] bool, group_index [B] i64 in [0, G); num_groups = G, num_rows = V
  //   rows         [U] i64   distinct ids, group after group; inside a group each id once, in any deterministic order. On
  //                CUDA [min(B * S, G * V)]: U is not known there; what follows must not be read
  //   row_offsets  [G + 1] i64: rows of group g are rows[row_offsets[g] : row_offsets[g + 1]]
  //   ids          [B, S] i64  the document's distinct ids in the order of their *first* unmasked position; -1 after the last
  //   slots        [B, S] i32  where in `rows` (of the pair's group) the id of the same place lies; -1 after the last
  //   counts       [B, S] i32  how many unmasked positions hold that id; 0 after the last
  //   lengths      [B] i64: number of distinct ids of the document
  // Ids under a False mask are never used, whatever they are (-1, V + 5). An id outside [0, V) under a True mask: the CPU
  // raises, CUDA traps. All results are on the device of the inputs, and nothing waits for it.
  m.def(
      "document_rows_distinct(Tensor document_ids, Tensor document_mask, Tensor group_index, SymInt num_groups, "
      "SymInt num_rows) -> (Tensor rows, Tensor row_offsets, Tensor ids, Tensor slots, Tensor counts, Tensor lengths)");
  // One pass over table rows: block[i] = table[rows[i]] (zeros where rows[i] == -1: padding), and on request
  //   inverse_norms[i] = 1 / ||table[rows[i]]||, 0 for a zero row.
  //   table [V, D], row stride free, last stride 1; rows [n] i64 in [-1, V); block [n, D], row stride free, last stride 1:
  //   compute dtype on the CPU, the table's dtype on CUDA; inverse_norms [n] float32 (float64 for a float64 table)
  m.def("document_rows_gather(Tensor table, Tensor rows, Tensor(a!) block, Tensor(b!)? inverse_norms) -> ()");

  // Sums of weighted rows: out[g, :] = (accumulate: +=) sum over e in offsets[g] .. offsets[g + 1] of weights[e] * source[rows[e], :]
  //   source [N, D], row stride free, last stride 1; rows [E] i64 in [0, N); weights [E] float32 (float64 for a float64
  //   source), or None: 1; offsets [G + 1] i64, ascending, in [0, E]; out [G, D], dtype of weights. Each sum has one fixed order.
  // Entries outside all segments are not read. CUDA traps at a wrong row, and trusts offsets.
  m.def(
      "weighted_rows(Tensor source, Tensor rows, Tensor? weights, Tensor offsets, bool accumulate, Tensor(a!) out) -> ()");

  // ---- primitives: similarity_topk, CPU only ----------------------------------------------------------------------------
  // Max over the tokens of each query. n rows of a block, M queries side by side:
  //   similarity [n, M * T] float32/float64 = block @ queries^T; inverse_norms [n] same dtype (cosine) or None (dot);
  //   query_mask [M, T] bool
  //   best[m, i] = max over t with query_mask[m, t] of similarity[i, m * T + t] * inverse_norms[i]; query_positions[m, i] =
  //   the smallest such t. best [M, n], query_positions [M, n] i32: views with a free row stride, last stride 1.
  // NaN wins over every number, so that it is seen. A query without tokens: -inf, -1.
  m.def(
      "similarity_topk_reduce(Tensor similarity, Tensor? inverse_norms, Tensor query_mask, Tensor(a!) best, "
      "Tensor(b!) query_positions) -> ()");
  // The k best distinct ids of each document, larger score first, ties to the earlier place in `ids` (= first position).
  //   best [M, U] float32/float64, best_positions [M, U] i32, best_row [B] i64 in [0, M): the row of `best` of each pair;
  //   ids [B, S] i64 and slots [B, S] i32 as from document_rows_distinct (slots index columns of `best`)
  //   inverse_norms [U] dtype of best, or None: 1 everywhere
  //   -> scores [B, k] dtype of best, clue_ids [B, k] i64, query_positions [B, k] i64, inverse norms [B, k] dtype of best;
  //   padding -inf, -1, -1, 0
  m.def(
      "similarity_topk_select(Tensor best, Tensor best_positions, Tensor best_row, Tensor? inverse_norms, Tensor ids, "
      "Tensor slots, SymInt k) -> (Tensor scores, Tensor clue_ids, Tensor query_positions, Tensor chosen_norms)");

  // ---- primitives: clue_attention ---------------------------------------------------------------------------------------
  // Softmax over the distinct tokens of each document, an id that occurs c times counting c times.
  //   scores [U, R] float32/float64: one row per distinct id, R = T * H columns (softmax runs along ids, per column);
  //   slots [P, n] i32, -1 = padding; counts [P, n] i32; first_slot: slots[p, j] - first_slot is the row of `scores`
  //   With s = scores[slots[p, j] - first_slot, r]:  lse[p, r] = log(sum over j of counts[p, j] * exp(s)), -inf without tokens;
  //   weights[p, j, r] = counts[p, j] * exp(s - lse[p, r]), 0 at padding.
  // lse [P, R] has the dtype of scores; weights [P, n, R] too on the CPU, on CUDA it may also be bf16 or fp16.
  m.def("clue_attention_lse(Tensor scores, Tensor slots, Tensor counts, SymInt first_slot, Tensor(a!) lse) -> ()");
  m.def(
      "clue_attention_weights(Tensor scores, Tensor slots, Tensor counts, Tensor lse, SymInt first_slot, "
      "Tensor(a!) weights) -> ()");
  // Their backward, per document: grad_weights [P, n, R] float32/float64 becomes the gradient to the scores,
  //   weights[p, j, r] * (grad_weights[p, j, r] - sum over i of weights[p, i, r] * grad_weights[p, i, r]).
  // 0 at padding, where grad_weights is not read.
  m.def("clue_attention_softmax_backward(Tensor weights, Tensor slots, Tensor(a!) grad_weights) -> ()");

  // Gathered products, CUDA only (on the CPU a GEMM of torch over gathered rows is faster than what could be written by hand).
  //   table [V, D], row stride free; rows [n] i64 in [0, V): lists of rows. Either end to end, offsets [lists + 1] i64, or each
  //   in its n / lists places, lengths [lists] i64. What follows the last list, or fills a list up, is not read.
  // products[u, r] = table[rows[u]] . dense[l, r] for u in list l. dense [lists, R, D], dtype of table;
  //   products [n, R] in the dtype of sums, not written for u of no list.
  m.def(
      "clue_attention_products(Tensor table, Tensor rows, Tensor? offsets, Tensor? lengths, Tensor dense, "
      "Tensor(a!) products) -> ()");
  // sums[l, r, d] = sum over u in list l of weights[u, h * R + r] * table[rows[u], d], h = d / (D / heads) the head of d.
  //   weights [n, heads * R], dtype of table; sums [lists, R, D] in the dtype of table or of sums; accumulate: += instead of =.
  m.def(
      "clue_attention_weighted_sums(Tensor table, Tensor rows, Tensor? offsets, Tensor? lengths, Tensor weights, "
      "SymInt heads, bool accumulate, Tensor(a!) sums) -> ()");

  // ---- primitives: token_log_likelihood ---------------------------------------------------------------------------------
  // With u = logit_scale * x + bias[c] and z = soft_cap * tanh(u / soft_cap) (z = u without a cap), dz/du = 1 - (z/soft_cap)^2.
  // One chunk of C words, numbers first .. first + C - 1 of the vocabulary, into the running state of each row.
  //   logits x [N, C] float32/float64, row stride free, last stride 1; bias [C] same dtype, or None; target_ids [N] i64
  //   running [3, N] same dtype: max of z, sum of exp(z - max), z of the target. Starts as (-inf, 0, -inf).
  //   expectation [N, D] same dtype, the caller's sums of exp(z - max) * something over the words before: multiplied by
  //   exp(max before - max after); and row n of logits becomes exp(z - max after) * dz/du, C numbers of dtype `kept` (that of
  //   logits; over float32 also bfloat16, and on CUDA float16) where the row began. None: logits are left or destroyed.
  m.def(
      "token_log_likelihood_chunk(Tensor(a!) logits, Tensor? bias, Tensor target_ids, SymInt first, float logit_scale, "
      "float? soft_cap, Tensor(b!) running, Tensor(c!)? expectation, ScalarType kept) -> ()");
  // After the last chunk: lse = max + log sum, log_p = z of the target - lse, and
  //   expectation[n] = logit_scale * (dz/du of the target * lm_head[target_ids[n]] - expectation[n] / sum[n])
  //   running, target_ids, expectation as above; lm_head [V, D] with any strides; log_p, lse [N]. An id outside [0, V): the
  //   CPU raises, CUDA traps.
  m.def(
      "token_log_likelihood_finish(Tensor running, Tensor lm_head, Tensor target_ids, float logit_scale, float? soft_cap, "
      "Tensor(a!) log_p, Tensor(b!) lse, Tensor(c!)? expectation) -> ()");
  // Gradient of sum_n grad[n] * log_p[n] with respect to u, in place of logits x of the chunk; lse, grad [N] same dtype:
  //   grad_u[n, c] = grad[n] * ([target_ids[n] == first + c] - exp(z - lse[n])) * dz/du;  0 where grad[n] == 0; `kept` as above
  m.def(
      "token_log_likelihood_chunk_backward(Tensor(a!) logits, Tensor? bias, Tensor target_ids, SymInt first, "
      "float logit_scale, float? soft_cap, Tensor lse, Tensor grad, ScalarType kept) -> ()");

  // ---- primitives: products of bfloat16 with float32 sums, CPU only (on CUDA: aten::mm.dtype) ------------------------------
  // What this processor has for them: 0 nothing (both raise), 1 AVX512-BF16, 2 AMX too, whose tiles may be left out.
  m.def("bfloat16_instructions() -> int");
  //   out = a @ b^T      a [N, D], b [C, D] bfloat16, D even; out [N, C] float32: row strides free, last strides 1
  m.def("bfloat16_products(Tensor a, Tensor b, Tensor(a!) out, bool tiles=True) -> ()");
  //   total += a @ b     a [N, C], b [C, D] bfloat16; total [N, D] float32: row strides free, last strides 1
  m.def("bfloat16_add_product(Tensor(a!) total, Tensor a, Tensor b, bool tiles=True) -> ()");

  // ---- linear layers in 8 bits, CPU only ------------------------------------------------------------------------------------
  // The fastest kernel that this processor has: 0 one for every processor, 1 AVX512-VNNI, 2 AMX.
  m.def("int8_instructions() -> int");
  //   x [N, D] float32, row stride free, D a multiple of 64; weight [C / 16, D / 4, 16, 4] int8, scale [C] float32, sums [C]
  //   int32 of the weights of each output; columns [R] int32, inputs whose weights are exact [R, C] float32; bias [C] float32;
  //   instructions: no faster kernel than this one -> out [N, C] float32
  m.def(
      "int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor sums, Tensor columns, Tensor exact, Tensor? bias, "
      "int instructions=2) -> Tensor");

  // ---- attention of bfloat16, CPUs with AMX only (others raise): what an LM's layer asks for between its projections ---------
  //   query [B, H, L, D], key and value [B, K, T, D], heads h * H / K .. of queries share head h of keys; mask bool
  //   [B or 1, 1, L, T]: last strides 1, all others free; D a multiple of 32
  //   -> out [B, L, H, D] and lse [B, H, L] float32, log-sum-exp of scale * query . key over the keys that the mask leaves; a
  //   row that has none: 0 and 0
  m.def(
      "bfloat16_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> (Tensor out, Tensor lse)");
  //   grad and out contiguous -> gradients of query as [B, L, H, D], of key and value as [B, K, T, D]
  m.def(
      "bfloat16_attention_backward(Tensor grad, Tensor out, Tensor lse, Tensor query, Tensor key, Tensor value, Tensor mask, "
      "float scale) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)");

  // ---- what an LM's layers compute between their products, CPU only; x float32 or bfloat16 -----------------------------------
  //   x [N, D], row stride free; weight [D] -> out = weight * round(x * scale) and scale [N] float32, 1 / sqrt(mean x^2 + eps)
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor out, Tensor scale)");
  //   grad [N, D] contiguous -> gradient of x
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) -> Tensor");
  //   gate and up [N, D] contiguous -> gate * sigmoid(gate) * up
  m.def("gated_silu(Tensor gate, Tensor up) -> Tensor");
  m.def("gated_silu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor grad_gate, Tensor grad_up)");
  //   x [B, H, L, D], all strides but the last free, D even; cos and sin [B or 1, L, D] contiguous -> [B, H, L, D] contiguous:
  //   x * cos + (-second half of x, first half of x) * sin; inverse: the transposed map of this one
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse=False) -> Tensor");
  //   prefixes: each [1, H, P <= slots, D] contiguous; rows: the prefix of each pair; suffixes [B, H, L, D], any strides; one
  //   dtype -> [B, H, slots + L, D]: zeros, the prefix of the pair, its suffix
  m.def("joined_prefixes(Tensor[] prefixes, int[] rows, Tensor suffixes, int slots) -> Tensor");
  //   query [B, H, L, D], key and value [B, heads, S, D] float32, H a multiple of heads, D of 16, strides but the last free;
  //   starts: one for each item -> [B, L, H, D]: query l sees the keys from start to S - L + l; one that sees none gets 0
  m.def("causal_attention_is_faster() -> bool");
  m.def("causal_attention(Tensor query, Tensor key, Tensor value, int[] starts, float scale) -> Tensor");
}
