// What the parts of the machine behind emulation.h share: fibers, how one waits or fails, what the race checker is
// told.
#pragma once
#include <deque>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "emulation.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace selfforcing::emulation {

constexpr int kWarpSize = 32;

// An asynchronous copy that its thread has not waited for.
struct Copy {
  void* target;
  const void* source;
  int bytes, given_bytes;
  unsigned group;
};

// What a thread has under way in hopper.cpp.
struct ThreadProducts;
struct ThreadStores;
struct Barrier;

struct Fiber {
  Thread thread;
  std::deque<Copy> copies;
  unsigned group = 0;  // of the next copy
  std::unique_ptr<ThreadProducts> products;
  std::unique_ptr<ThreadStores> stores;
  char* stack = nullptr;
  const char* waits_for = nullptr;      // nullptr: may run
  const Barrier* at_barrier = nullptr;  // the mbarrier that it waits for
  std::source_location where;
  bool done = false;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

extern Fiber* running;
extern std::vector<std::unique_ptr<Fiber>> fibers;
extern int num_threads;
extern size_t shared_bytes;

// Which of `count` things that may happen in any order happens next.
int next_of(int count);

// Ends the launch: run() throws what is said here. The fiber is left as it is, so nothing on its stack may own memory.
[[noreturn]] void fail(std::source_location where, const char* what, const std::source_location* others = nullptr);

// Lets others run until one of them sets this fiber's waits_for to nullptr.
void wait(const char* what, std::source_location where);

std::string describe(std::source_location where);
bool same_place(std::source_location a, std::source_location b);

// ---- The race checker

// Who ordered what before what.
void release(void* event);
void acquire(void* event);

// Accesses to memory that the machine makes for a thread.
void note_read(const void* address, size_t bytes);
void note_write(void* address, size_t bytes);

// In its scope the checker does not look at accesses of this thread: the machine works for itself. No fiber is left in
// it.
class Unseen {
 public:
  Unseen();
  ~Unseen();
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// A thread of its own to the checker, which starts after what its maker did.
class Engine {
 public:
  Engine();
  Engine(Engine&& other) noexcept : tsan_fiber_(std::exchange(other.tsan_fiber_, nullptr)) {}
  Engine& operator=(Engine&& other) noexcept {
    std::swap(tsan_fiber_, other.tsan_fiber_);
    return *this;
  }
  ~Engine();

  // Calls work() as this thread.
  template <typename Work>
  void act(const Work& work) {
    enter();
    work();
    leave();
  }

 private:
  void enter();
  void leave();
  void* tsan_fiber_ = nullptr;
};

// ---- hopper.cpp, as the scheduler sees it

void start_block();
void finish_thread();                          // fails where something is still under way
bool complete_a_load();                        // false: none is under way
std::string describe(const Barrier& barrier);  // what it still misses
std::string unfinished_loads();                // of a block that has ended; empty where there are none

// Called where threads have met: what they fenced is what copies and products of warpgroups see from here on.
void publish_fenced();

}  // namespace selfforcing::emulation
