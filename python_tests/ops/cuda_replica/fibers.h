// The threads of a block as fibers, which take turns where they wait for each other; see cuda_runtime.h.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned size) : x(size) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace replica {

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Copy {  // of 16 bytes, asked for by cp.async
  char* to;
  const char* from;
  int bytes;
};

struct Fiber {
  ucontext_t context;
  jmp_buf at;  // switching by setjmp/longjmp needs no system call
  State state;
  bool started = false;
  std::vector<Copy> open;                 // copies not yet committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr size_t kStack = 64 << 10;
};

// What the lanes of a warp leave for each other.
struct Warp {
  static constexpr int kBytes = 64;
  int arrived = 0;
  const void* call;  // which instruction they are at
  alignas(16) char in[32][kBytes], out[32][kBytes];
};

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline const char* failure = nullptr;

__attribute__((noinline)) inline void leave(State state) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.state = state;
  if (_setjmp(fiber.at) == 0) _longjmp(scheduler, 1);
}

inline void live() {  // a fiber serves one block after the other
  for (;;) {
    body();
    leave(State::kDone);
  }
}

__attribute__((noinline)) inline void resume(unsigned thread) {
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[threadIdx.x];
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void run_threads(unsigned threads, bool backward) {
  while (fibers.size() < threads) {
    Fiber& fiber = fibers.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, live, 0);
  }
  warps.assign((threads + 31) / 32, Warp());
  for (unsigned t = 0; t < threads; ++t) {
    fibers[t].state = State::kReady;
    fibers[t].open.clear(), fibers[t].groups.clear();
  }
  for (bool ran = true; !failure;) {
    ran = false;
    for (unsigned i = 0; i < threads && !failure; ++i) {
      const unsigned t = backward ? threads - 1 - i : i;
      if (fibers[t].state != State::kReady) continue;
      resume(t);
      ran = true;
    }
    if (ran || failure) continue;
    const auto count = [&](State state) {
      return std::count_if(fibers.begin(), fibers.begin() + threads, [&](const Fiber& fiber) { return fiber.state == state; });
    };
    if (count(State::kDone) == threads) return;
    if (count(State::kAtWarp)) failure = "some lanes of a warp wait for the others";
    else if (count(State::kDone)) failure = "some threads left, others wait at a barrier";
    else for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::kReady;
  }
  fibers.clear();  // stopped in the middle
}

// A call of the whole warp: together(in, out) sees what all lanes brought; each gets its own out.
template <typename In, typename Out, typename Together>
Out whole_warp(const In& mine, Together together) {
  static_assert(sizeof(In) <= Warp::kBytes && sizeof(Out) <= Warp::kBytes);
  static const char call = 0;  // its address names this instruction
  Warp& warp = warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  if (warp.arrived++ == 0) warp.call = &call;
  if (warp.call != &call) {
    failure = "the lanes of a warp are at different calls";
    leave(State::kDone);
  }
  std::memcpy(warp.in[lane], &mine, sizeof(In));
  if (warp.arrived == 32) {
    In in[32];
    Out out[32];
    for (int l = 0; l < 32; ++l) std::memcpy(&in[l], warp.in[l], sizeof(In));
    together(in, out);
    for (int l = 0; l < 32; ++l) std::memcpy(warp.out[l], &out[l], sizeof(Out));
    warp.arrived = 0;
    const unsigned first = threadIdx.x - lane;
    for (unsigned l = 0; l < 32; ++l) fibers[first + l].state = State::kReady;
  } else {
    leave(State::kAtWarp);
  }
  Out result;
  std::memcpy(&result, warp.out[lane], sizeof(Out));
  return result;
}

}  // namespace replica
