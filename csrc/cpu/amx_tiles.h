// Tiles of AMX and memory for them. Only files that run on processors with AMX may include it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <memory>
#include <new>

namespace qpeft {
namespace {

constexpr int64_t kTile = 16;  // rows, and vectors of 64 bytes
constexpr int64_t kLine = 64;  // bytes of the row of a tile

// All tiles are whole: what is ragged is filled up with zeros. The tiles of a thread are free for others afterwards.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {kLine, kLine, kLine, kLine, kLine, kLine, kLine, kLine};
      uint8_t rows[16] = {kTile, kTile, kTile, kTile, kTile, kTile, kTile, kTile};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(kLine)); }
};
template <typename T>
std::unique_ptr<T[], Free> aligned(int64_t n) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kLine))));
}

}  // namespace
}  // namespace qpeft
