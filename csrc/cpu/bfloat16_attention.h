// Attention of bfloat16 on processors with AMX: kernels in a file of their own, which bfloat16_attention.cpp calls where
// they may run.
#pragma once
#include <cstdint>

namespace qpeft {

// Rows of several heads: row l of head h is at + h * head + l * row, its numbers are neighbours.
template <typename T>
struct HeadRows {
  T* at;
  int64_t head, row;
};

// One head of keys and values of one item, and the heads of queries that share it.
struct AttentionHead {
  int64_t heads, L, T, D;  // query heads, rows of each, keys, width
  HeadRows<const uint16_t> query;
  const uint16_t *key, *value;
  int64_t key_row, value_row;
  const bool* mask;  // [L, T]
  int64_t mask_row;
  float scale;
};

// Memory of one thread, for heads of the same sizes.
struct AttentionMemory;
AttentionMemory* new_attention_memory(const AttentionHead& head, bool backward);
void delete_attention_memory(AttentionMemory* memory);

// For rows begin .. end of the heads * L. lse [heads * L]: of each row the log-sum-exp of its scores, 0 where the mask leaves
// no key (out is 0 there).
void attend(const AttentionHead& head, int64_t begin, int64_t end, AttentionMemory& memory,
            const HeadRows<uint16_t>& out, float* lse);

// Gradients of sum(out * grad); those of keys and values, [T, D], are summed over the query heads.
void attend_backward(const AttentionHead& head, AttentionMemory& memory, const HeadRows<const uint16_t>& out,
                     const float* lse, const HeadRows<const uint16_t>& grad, const HeadRows<uint16_t>& grad_query,
                     uint16_t* grad_key, uint16_t* grad_value);

}  // namespace qpeft
