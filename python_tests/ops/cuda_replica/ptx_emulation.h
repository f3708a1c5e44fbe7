// The instructions of csrc/cuda/ptx.cuh, by the fragment layouts of the PTX manual (warp-level matrix instructions).
#pragma once
#include "cuda_runtime.h"

namespace qpeft {

inline char* block_memory() { return replica::dynamic_memory(); }

// ---- cp.async: what was asked for arrives at the wait, and not a moment earlier; until then the target is spoilt, since on
// a GPU it may hold the old or the new bytes.
inline void cp_async_16(void* to, const void* from, int bytes) {
  std::memset(to, 0xFF, 16);
  replica::fibers[threadIdx.x].open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes});
}
inline void cp_async_commit() {
  auto& thread = replica::fibers[threadIdx.x];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int kPending>
void cp_async_wait() {
  auto& groups = replica::fibers[threadIdx.x].groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

// ---- ldmatrix: lane 8 i + r brings the address of row r (16 bytes) of matrix i
inline void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed) {
  struct In { const void* row; bool transposed; };
  struct Out { uint32_t registers[4]; };
  const Out mine = replica::whole_warp<In, Out>({row, transposed}, [](const In* in, Out* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int h = 0; h < 2; ++h) {
          int r = lane / 4, column = lane % 4 * 2 + h;
          if (in[0].transposed) std::swap(r, column);
          std::memcpy(&pair[h], static_cast<const char*>(in[8 * i + r].row) + 2 * column, 2);
        }
        std::memcpy(&out[lane].registers[i], pair, 4);
      }
  });
  std::memcpy(registers, mine.registers, sizeof(registers));
}
inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row) { load_matrices(registers, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&registers)[4], const void* row) { load_matrices(registers, row, true); }

// ---- mma.m16n8k16: c[16, 8] += a[16, 16] b[16, 8]; lane = 4 g + c
template <typename Half>
void mma_16816(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  static_assert(sizeof(Half) == 2);
  struct In { uint32_t a[4], b[2]; float c[4]; };
  struct Out { float c[4]; };
  const In mine{{a0, a1, a2, a3}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const Out sums = replica::whole_warp<In, Out>(mine, [](const In* in, Out* out) {
    float a[16][16], b[8][16];  // b by columns
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, k = lane % 4 * 2;
      Half pair[2];
      for (int i = 0; i < 4; ++i) {
        std::memcpy(pair, &in[lane].a[i], 4);
        for (int h = 0; h < 2; ++h) a[group + i % 2 * 8][k + i / 2 * 8 + h] = static_cast<float>(pair[h]);
      }
      for (int i = 0; i < 2; ++i) {
        std::memcpy(pair, &in[lane].b[i], 4);
        for (int h = 0; h < 2; ++h) b[group][k + i * 8 + h] = static_cast<float>(pair[h]);
      }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const float *row = a[lane / 4 + i / 2 * 8], *column = b[lane % 4 * 2 + i % 2];
        float sum = in[lane].c[i];
        for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
        out[lane].c[i] = sum;
      }
  });
  std::memcpy(c, sums.c, sizeof(c));
}

template <typename Half>
float2 unpack(uint32_t word) {
  Half pair[2];
  std::memcpy(pair, &word, 4);
  return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
}

}  // namespace qpeft
