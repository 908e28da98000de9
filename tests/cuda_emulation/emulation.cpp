// The machine behind emulation.h. Compile it without -fsanitize=thread, even when the kernels are compiled with it: the
// kernels' accesses are what the race checker shall see, ordered by barriers and warp operations alone.
#include "emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <random>
#include <stdexcept>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SELFFORCING_RACE_CHECK)
#include <sanitizer/tsan_interface.h>
// What the compiler calls for accesses of many bytes.
extern "C" void __tsan_read_range(void* address, unsigned long bytes);
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace selfforcing::emulation {

Fiber scheduler;  // the fiber of whoever called run()
Fiber* running = &scheduler;
std::vector<std::unique_ptr<Fiber>> fibers;
int num_threads;
size_t shared_bytes;

namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kGuardBytes = size_t{64} << 10;  // a multiple of every page size
constexpr size_t kSharedAlignment = 1024;         // as SELFFORCING_DYNAMIC_SHARED asks for

// ---- Fibers: a stack each, and a switch between them.

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, stores the stack pointer, takes the other one (System V ABI).
__attribute__((naked, noinline)) void switch_stacks(void** /*save*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
#endif

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

void after_switch() {
#if defined(__SANITIZE_ADDRESS__)
  const void* left_stack;
  size_t left_bytes;
  __sanitizer_finish_switch_fiber(running->fake_stack, &left_stack, &left_bytes);
  if (running != &scheduler && scheduler_stack == nullptr)
    scheduler_stack = left_stack, scheduler_stack_bytes = left_bytes;
#endif
}

void switch_to(Fiber& to) {
  Fiber& from = *running;
  running = &to;
  current_thread = &to.thread;
#if defined(__SANITIZE_ADDRESS__)
  const bool back = &to == &scheduler;
  __sanitizer_start_switch_fiber(&from.fake_stack, back ? scheduler_stack : to.stack,
                                 back ? scheduler_stack_bytes : kStackBytes);
#endif
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_switch_to_fiber(to.tsan_fiber, 1);  // 1: the switch itself orders nothing
#endif
#if defined(__x86_64__)
  switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  after_switch();
}

// ---- The block that runs now

struct BlockBarrier {
  int arrived = 0;
  std::source_location where;
  unsigned round = 0;
  char event[2];  // by parity of the round: nobody is two rounds ahead
};

// The operands of one lane of a product or a load of matrices.
struct Operands {
  const void* row;
  void* result;
  const unsigned *a, *b;
};

struct Warp {
  unsigned arrived = 0, mask = 0, round = 0;
  std::source_location where;
  uint64_t value[2][kWarpSize];  // by parity of the round
  Operands operands[kWarpSize];
  unsigned votes[2];
  char event[2];
};

void (*kernel_body)(void*);
void* kernel_context;
int num_done;
BlockBarrier barrier;
std::vector<Warp> warps;
void* shared = nullptr;
std::string error;
Order turn_order = Order::forward;
std::mt19937 turn_random;
char kernel_start, kernel_end;

}  // namespace

std::string describe(std::source_location where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same_place(std::source_location a, std::source_location b) {
  return a.line() == b.line() && a.column() == b.column() && std::string(a.file_name()) == b.file_name();
}

void fail(std::source_location where, const char* what, const std::source_location* others) {
  {
    const Unseen unseen;
    const Thread& t = running->thread;
    error = "block (" + std::to_string(t.block.x) + ", " + std::to_string(t.block.y) + ", " +
            std::to_string(t.block.z) + "), thread " + std::to_string(t.warp * kWarpSize + t.lane) + ", " +
            describe(where) + ": " + what;
    if (others != nullptr) error += " " + describe(*others);
  }
  switch_to(scheduler);
  std::abort();  // a failed fiber is never resumed
}

void wait(const char* what, std::source_location where) {
  running->waits_for = what;
  running->where = where;
  switch_to(scheduler);
}

int next_of(int count) {
  if (turn_order == Order::random) return static_cast<int>(turn_random() % static_cast<unsigned>(count));
  return turn_order == Order::reverse ? count - 1 : 0;
}

// ---- The race checker

void release([[maybe_unused]] void* event) {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_release(event);
#endif
}
void acquire([[maybe_unused]] void* event) {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_acquire(event);
#endif
}

void note_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes) {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_read_range(const_cast<void*>(address), bytes);
#endif
}
void note_write([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_write_range(address, bytes);
#endif
}

Unseen::Unseen() {
#if defined(SELFFORCING_RACE_CHECK)
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
}
Unseen::~Unseen() {
#if defined(SELFFORCING_RACE_CHECK)
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
}

Engine::Engine() {
#if defined(SELFFORCING_RACE_CHECK)
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}
Engine::~Engine() {
#if defined(SELFFORCING_RACE_CHECK)
  if (tsan_fiber_ != nullptr) __tsan_destroy_fiber(tsan_fiber_);
#endif
}
void Engine::enter() {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_switch_to_fiber(tsan_fiber_, 1);
#endif
}
void Engine::leave() {
#if defined(SELFFORCING_RACE_CHECK)
  __tsan_switch_to_fiber(running->tsan_fiber, 1);
#endif
}

namespace {

void fiber_main() {
  after_switch();
  acquire(&kernel_start);
  kernel_body(kernel_context);
  if (!running->copies.empty()) fail(running->where, "the thread ends before its asynchronous copies do");
  finish_thread();
  release(&kernel_end);
  running->done = true;
  ++num_done;
  switch_to(scheduler);
  std::abort();  // a finished fiber is never resumed
}

void prepare(Fiber& fiber) {
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.at_barrier = nullptr;
  fiber.fake_stack = nullptr;
  fiber.copies.clear();
  fiber.group = 0;
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0)
      throw std::runtime_error("no memory for the stack of a CUDA thread");
    fiber.stack = static_cast<char*>(memory) + kGuardBytes;
#if defined(SELFFORCING_RACE_CHECK)
    fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // a failed fiber left its frames behind
#endif
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // keeps the stack aligned as at a function's entry
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int registers = 0; registers < 6; ++registers) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

// The threads take turns until all are done; a turn lasts until the thread waits.
void run_block() {
  std::vector<Fiber*> turn(num_threads);
  while (num_done < num_threads && error.empty()) {
    for (int i = 0; i < num_threads; ++i)
      turn[i] = fibers[turn_order == Order::reverse ? num_threads - 1 - i : i].get();
    if (turn_order == Order::random) std::shuffle(turn.begin(), turn.end(), turn_random);
    bool anyone_ran = false;
    for (Fiber* fiber : turn) {
      if (fiber->done || fiber->waits_for != nullptr || !error.empty()) continue;
      anyone_ran = true;
      switch_to(*fiber);
    }
    // Only where nobody can go on without it does a copy arrive: who does not wait for it sees that it is not there.
    if (anyone_ran || !error.empty() || complete_a_load()) continue;
    error = "deadlock, " + std::to_string(num_done) + " of " + std::to_string(num_threads) + " threads are done";
    const Fiber* shown = nullptr;
    for (int i = 0; i < num_threads; ++i) {
      const Fiber& fiber = *fibers[i];
      if (fiber.done || (shown != nullptr && same_place(shown->where, fiber.where))) continue;
      shown = &fiber;
      error += "; thread " + std::to_string(i) + " waits for " + fiber.waits_for + " at " + describe(fiber.where);
      if (fiber.at_barrier != nullptr) error += ", which misses " + describe(*fiber.at_barrier);
    }
  }
}

}  // namespace

const Thread* current_thread = &scheduler.thread;

void set_order(Order order, unsigned seed) {
  turn_order = order;
  turn_random.seed(seed);
}

void* shared_memory() { return shared; }

// CUDA C++ Programming Guide, technical specifications.
void check_launch(dim3 grid, dim3 block) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxThreads = 1024, kMaxBlockZ = 64;
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
    throw std::runtime_error("a grid of " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                             std::to_string(grid.z) + " blocks is larger than a GPU takes");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > kMaxBlockZ)
    throw std::runtime_error("a block of " + std::to_string(block.x) + " x " + std::to_string(block.y) + " x " +
                             std::to_string(block.z) + " threads is not what a GPU takes");
}

void run(dim3 grid, dim3 block, size_t bytes, void (*body)(void* context), void* context) {
  check_launch(grid, block);
  shared_bytes = bytes;
  num_threads = static_cast<int>(block.x * block.y * block.z);
  kernel_body = body;
  kernel_context = context;
  error.clear();
#if defined(SELFFORCING_RACE_CHECK)
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  while (static_cast<int>(fibers.size()) < num_threads) fibers.push_back(std::make_unique<Fiber>());
  if (posix_memalign(&shared, kSharedAlignment, std::max<size_t>(shared_bytes, 1)) != 0)
    throw std::runtime_error("no memory for a block's shared memory");
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t index = 0; index < num_blocks && error.empty(); ++index) {
    const dim3 place(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    std::memset(shared, 0xff, shared_bytes);  // NaN, whatever the type
    barrier = {};
    warps.assign((num_threads + kWarpSize - 1) / kWarpSize, {});
    num_done = 0;
    start_block();
    for (int i = 0; i < num_threads; ++i) {
      const unsigned u = static_cast<unsigned>(i);
      fibers[i]->thread = {{u % block.x, u / block.x % block.y, u / (block.x * block.y)},
                           place,
                           block,
                           grid,
                           i % kWarpSize,
                           i / kWarpSize};
      prepare(*fibers[i]);
    }
    release(&kernel_start);
    run_block();
    acquire(&kernel_end);
    if (error.empty()) error = unfinished_loads();
  }
  std::free(shared);
  shared = nullptr;
  if (!error.empty()) throw std::runtime_error(error);
}

void block_barrier(std::source_location where) {
  if (barrier.arrived == 0)
    barrier.where = where;
  else if (!same_place(barrier.where, where))
    fail(where, "__syncthreads while others wait at", &barrier.where);
  char* event = &barrier.event[barrier.round % 2];
  release(event);
  if (++barrier.arrived < num_threads) {
    wait("__syncthreads", where);
  } else {
    barrier.arrived = 0;
    ++barrier.round;
    publish_fenced();
    for (int i = 0; i < num_threads; ++i) fibers[i]->waits_for = nullptr;
  }
  acquire(event);
}

uint64_t exchange(unsigned mask, uint64_t value, int source_lane, bool vote, unsigned* votes,
                  std::source_location where) {
  const int lane = running->thread.lane;
  const int first = running->thread.warp * kWarpSize;
  if (num_threads - first < kWarpSize) mask &= (1u << (num_threads - first)) - 1;  // lanes that do not exist
  Warp& warp = warps[running->thread.warp];
  if ((mask >> lane & 1) == 0) fail(where, "a warp operation without the calling lane in its mask");
  if (warp.arrived == 0) {
    warp.where = where;
    warp.mask = mask;
    warp.votes[warp.round % 2] = 0;
  } else if (warp.mask != mask || !same_place(warp.where, where)) {
    fail(where, "a warp operation while others wait at", &warp.where);
  }
  const unsigned parity = warp.round % 2;
  warp.value[parity][lane] = value;
  warp.votes[parity] |= static_cast<unsigned>(vote) << lane;
  warp.arrived |= 1u << lane;
  release(&warp.event[parity]);
  if (warp.arrived != mask) {
    wait("a warp operation", where);
  } else {
    warp.arrived = 0;
    ++warp.round;
    for (int i = 0; i < kWarpSize; ++i)
      if ((mask >> i & 1) != 0) fibers[first + i]->waits_for = nullptr;
  }
  acquire(&warp.event[parity]);
  if ((mask >> (source_lane & 31) & 1) == 0) fail(where, "a warp operation reads a lane that takes no part");
  if (votes != nullptr) *votes = warp.votes[parity];
  return warp.value[parity][source_lane & 31];
}

void copy_async(void* target, const void* source, int bytes, int given_bytes) {
  note_write(target, bytes);
  note_read(source, given_bytes);
  std::memset(target, 0xff, bytes);  // NaN in every dtype
  running->copies.push_back({target, source, bytes, given_bytes, running->group});
}

void commit_copies() { ++running->group; }

void wait_for_copies(int newest_groups_left) {
  std::deque<Copy>& copies = running->copies;
  const unsigned complete = running->group - std::min<unsigned>(running->group, newest_groups_left);
  for (; !copies.empty() && copies.front().group < complete; copies.pop_front()) {
    const Copy& copy = copies.front();
    note_write(copy.target, copy.bytes);
    std::memcpy(copy.target, copy.source, copy.given_bytes);
    std::memset(static_cast<char*>(copy.target) + copy.given_bytes, 0, copy.bytes - copy.given_bytes);
  }
}

namespace {

// All lanes of the warp meet; the last to come acts for all of them while the others stand still.
template <typename Act>
void act_together(const Operands& operands, std::source_location where, const Act& act) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = running->thread.lane, first = running->thread.warp * kWarpSize;
  Warp& warp = warps[running->thread.warp];
  if (num_threads - first < kWarpSize) fail(where, "a matrix operation by a warp that is not full");
  if (warp.arrived == 0) {
    warp.where = where;
    warp.mask = kAll;
  } else if (warp.mask != kAll || !same_place(warp.where, where)) {
    fail(where, "a matrix operation while others wait at", &warp.where);
  }
  warp.operands[lane] = operands;
  warp.arrived |= 1u << lane;
  if (warp.arrived != kAll) {
    wait("a matrix operation", where);
    return;
  }
  act(warp.operands);
  warp.arrived = 0;
  for (int i = 0; i < kWarpSize; ++i) fibers[first + i]->waits_for = nullptr;
}

uint16_t half_of(const unsigned* registers, int index) {
  return static_cast<uint16_t>(registers[index / 2] >> (index % 2 * 16));
}

}  // namespace

void load_matrices(unsigned* to, const void* row, bool transposed, std::source_location where) {
  constexpr int kSide = 8;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail(where, "a row of a matrix that is not aligned to 16 bytes");
  note_read(row, kSide * sizeof(uint16_t));
  act_together({row, to, nullptr, nullptr}, where, [&](const Operands* lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const int line = transposed ? lane % 4 * 2 + i : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + i;
          pair[i] = static_cast<const uint16_t*>(lanes[matrix * kSide + line].row)[column];
        }
        std::memcpy(static_cast<unsigned*>(lanes[lane].result) + matrix, pair, sizeof(pair));
      }
  });
}

void multiply_add(float* sum, const unsigned* a, const unsigned* b, float (*to_float)(uint16_t),
                  std::source_location where) {
  act_together({nullptr, sum, a, b}, where, [&](const Operands* lanes) {
    constexpr int kRows = 16, kColumns = 8, kDepth = 16;
    float left[kRows][kDepth], right[kDepth][kColumns];
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 8; ++i)
        left[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] = to_float(half_of(lanes[lane].a, i));
      for (int i = 0; i < 4; ++i) right[pair + i % 2 + i / 2 * 8][group] = to_float(half_of(lanes[lane].b, i));
    }
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float& total = static_cast<float*>(lanes[lane].result)[i];
        for (int k = 0; k < kDepth; ++k) total += left[row][k] * right[k][column];
      }
  });
}

}  // namespace selfforcing::emulation

// ---- Narrow floats

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

}  // namespace

float __bfloat162float(__nv_bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

__nv_bfloat16 __float2bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return float_of(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) return (sign != 0 ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

__half __float2half(float x) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (x != x) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // halfway beyond the largest, 65504
  if (size < 0x1p-14f)                                                  // subnormal: a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(nearbyintf(size * 0x1p24f)))};
  const uint32_t bits = bits_of(size);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13))};
}
