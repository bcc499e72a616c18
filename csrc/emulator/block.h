// One block of threads on a CPU thread. Every CUDA thread is a fiber that runs until it must wait: at a barrier for the
// block, at a warp-wide instruction for the other 31 lanes. Fibers that wait for what can no longer come end the
// process, and so do lanes that meet at different instructions: on a GPU both are undefined or a hang.
//
// Warps run one after another as far as they can, in an order that tests may turn round: whoever forgets a barrier
// finds the others' work undone.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <memory>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

constexpr int LANES = 32;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulator: %s (block %u %u %u, thread %u)\n", what, blockIdx.x, blockIdx.y, blockIdx.z,
          threadIdx.x);
  fflush(stderr);
  abort();
}

// What the tests of the emulator ask for: an order of warps, and bugs that it must then catch.
enum Bug { NO_BARRIER = 1, NO_WAIT = 2, SWAP_FRAGMENT = 4, SWAP_SELECTOR = 8, NO_CONVERGENCE = 16 };
inline int bugs = 0;
inline bool warps_backwards = false;

struct Copy {
  unsigned char* shared;
  const void* global;
  int bytes, valid;
};

struct Fiber {
  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started, finished;
  const unsigned* gate;  // it may go on when *gate is no longer `closed`
  unsigned closed;
  std::vector<Copy> open;                // cp.async, not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  unsigned passed = 0;  // warp-wide instructions
  int arrived = 0, line = 0;
  const char* instruction = nullptr;
  void* arguments[LANES] = {};
};

struct Byte {
  enum State : uint8_t { NEVER_WRITTEN, WRITTEN, UNDER_WAY } state = NEVER_WRITTEN;
  uint8_t writer = 0;
  unsigned written = 0, read = 0, readers = 0;  // barriers before, and one bit a warp for the readers since
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Byte> shadow;
  std::vector<unsigned char> storage;
  unsigned char* shared = nullptr;
  jmp_buf scheduler;
  unsigned barriers = 1, waiting = 0;
  int barrier_line = 0;
  unsigned current = 0;
  std::function<void()> body;

  Fiber& fiber() { return fibers[current]; }
  unsigned warp_number() const { return current / LANES; }
};
inline thread_local Block* block = nullptr;

inline void enter() {
  block->body();
  block->fiber().finished = true;
  _longjmp(block->scheduler, 1);
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Lets the others run until *gate changes.
__attribute__((noinline)) inline void wait_for(const unsigned* gate, unsigned closed) {
  Fiber& fiber = block->fiber();
  fiber.gate = gate, fiber.closed = closed;
  if (!_setjmp(fiber.at)) _longjmp(block->scheduler, 1);
}

inline void barrier(int line) {
  if (bugs & NO_BARRIER) return;
  Block& b = *block;
  if (b.waiting > 0 && b.barrier_line != line) fail("threads of a block meet at different barriers");
  b.barrier_line = line;
  const unsigned passed = b.barriers;
  if (++b.waiting == b.fibers.size()) {
    b.waiting = 0;
    ++b.barriers;
  } else {
    wait_for(&b.barriers, passed);
  }
}

// `run` does the work of a warp-wide instruction on the arguments of all 32 lanes, once they have all come.
template <typename A, typename Run>
void warp_wide(const char* instruction, int line, A& mine, const Run& run) {
  Block& b = *block;
  Warp& warp = b.warps[b.warp_number()];
  if (warp.arrived > 0 && (warp.line != line || warp.instruction != instruction))
    fail("lanes of a warp meet at different instructions");
  warp.line = line, warp.instruction = instruction;
  warp.arguments[b.current % LANES] = &mine;
  const unsigned passed = warp.passed;
  if (++warp.arrived == LANES) {
    A* all[LANES];
    for (int lane = 0; lane < LANES; ++lane) all[lane] = static_cast<A*>(warp.arguments[lane]);
    run(all);
    warp.arrived = 0;
    ++warp.passed;
  } else {
    wait_for(&warp.passed, passed);
  }
}

// Checks an access of this thread to shared memory: bounds, alignment, bytes never written or still being copied, and
// races: two warps at one byte, one of them writing, and no barrier between. Lanes of one warp are not told apart.
inline void check_shared(const void* pointer, int bytes, bool write, Byte::State becomes = Byte::WRITTEN) {
  Block& b = *block;
  const ptrdiff_t at = static_cast<const unsigned char*>(pointer) - b.shared;
  if (at < 0 || at + bytes > ptrdiff_t(b.shadow.size())) fail("an access outside of shared memory");
  if (at % bytes != 0) fail("a misaligned access to shared memory");
  const unsigned warp = b.warp_number(), now = b.barriers;
  for (int i = 0; i < bytes; ++i) {
    Byte& byte = b.shadow[at + i];
    if (byte.read != now) byte.read = now, byte.readers = 0;
    const bool fresh = byte.state != Byte::NEVER_WRITTEN && byte.written == now && byte.writer != warp;
    if (write) {
      if (fresh) fail("two warps write a byte of shared memory without a barrier between");
      if (byte.readers & ~(1u << warp)) fail("a warp writes what another reads without a barrier between");
      byte.state = becomes, byte.writer = uint8_t(warp), byte.written = now;
    } else {
      if (byte.state == Byte::NEVER_WRITTEN) fail("a read of shared memory that was never written");
      if (byte.state == Byte::UNDER_WAY) fail("a read of shared memory that an asynchronous copy may still write");
      if (fresh) fail("a warp reads what another wrote without a barrier between");
      byte.readers |= 1u << warp;
    }
  }
}

// Runs `body` in every thread of a block.
inline void run_block(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  constexpr size_t STACK = 256 * 1024;
  static thread_local Block b;
  block = &b;
  b.body = body;
  b.fibers.resize(threads);
  b.warps.assign((threads + LANES - 1) / LANES, Warp());
  b.shadow.assign(shared_bytes, Byte());
  b.storage.assign(shared_bytes + 1024, 0xCB);
  b.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(b.storage.data()) + 1023) / 1024 * 1024);
  b.barriers = 1, b.waiting = 0;
  for (Fiber& fiber : b.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    fiber.started = fiber.finished = false;
    fiber.gate = nullptr;
    fiber.open.clear(), fiber.groups.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  const unsigned warps = unsigned(b.warps.size());
  for (bool all = false; !all;) {
    bool moved = false;
    all = true;
    for (unsigned turn = 0; turn < warps; ++turn) {
      const unsigned warp = warps_backwards ? warps - 1 - turn : turn;
      for (bool again = true; again;) {
        again = false;
        for (unsigned thread = warp * LANES; thread < (warp + 1) * LANES && thread < threads; ++thread) {
          Fiber& fiber = b.fibers[thread];
          if (fiber.finished) continue;
          if (fiber.gate && *fiber.gate == fiber.closed) {
            all = false;
            continue;
          }
          fiber.gate = nullptr;
          b.current = thread;
          threadIdx = dim3(thread, 0, 0);
          resume(fiber);
          again = moved = true;
          all = all && fiber.finished;
        }
      }
    }
    if (!all && !moved) fail("threads wait for a barrier or a warp-wide instruction that others never reach");
  }
  block = nullptr;
}

}  // namespace emulator
