// Threads for CPU kernels without knowing where they come from: the torch layer passes torch's own pool (a second
// OpenMP run-time in one process makes both several times slower), the C++ tests pass std::thread.
#pragma once
#include <atomic>
#include <cstdint>

namespace selfforcing {

struct Parallel {
  int32_t num_threads = 1;
  // Calls body(context, worker) once for every worker in [0, num_workers), concurrently where it can.
  void (*run)(int32_t num_workers, void (*body)(void* context, int32_t worker), void* context) = nullptr;

  // Calls work(item, worker) for every item, handing out items in order to whichever worker is free. Which worker gets
  // an item must not change the result.
  template <typename Work>
  void for_each(int64_t num_items, const Work& work) const {
    const int32_t workers = num_items < num_threads ? static_cast<int32_t>(num_items) : num_threads;
    if (workers <= 1 || run == nullptr) {
      for (int64_t item = 0; item < num_items; ++item) work(item, 0);
      return;
    }
    struct Shared {
      const Work* work;
      int64_t num_items;
      std::atomic<int64_t> next;
    } shared{&work, num_items, {0}};
    run(
        workers,
        [](void* context, int32_t worker) {
          auto& s = *static_cast<Shared*>(context);
          for (int64_t item; (item = s.next.fetch_add(1, std::memory_order_relaxed)) < s.num_items;)
            (*s.work)(item, worker);
        },
        &shared);
  }
};

}  // namespace selfforcing
