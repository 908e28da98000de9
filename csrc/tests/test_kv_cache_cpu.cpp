// The CPU cache write.
#include "cpu_test.h"
#include "kv_cache_problems.h"

int main() {
  using namespace selfforcing;
  return kernel_test::run_cpu_test([] {
    const bool copies = kv_cache_test::check_all(kv_cache_write_cpu, {1, 2, 5});
    return kv_cache_test::check_all_quantised(kv_cache_write_cpu, {1, 3}) && copies;
  });
}
