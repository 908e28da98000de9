// The CPU cache write, and with it normalised and rotated keys.
#include "cpu_test.h"
#include "kv_cache_problems.h"
#include "norm_rope_write_problems.h"

int main() {
  using namespace selfforcing;
  return kernel_test::run_cpu_test([] {
    const bool copies = kv_cache_test::check_all(kv_cache_write_cpu, {1, 2, 5});
    const bool quantised = kv_cache_test::check_all_quantised(kv_cache_write_cpu, {1, 3});
    norm_rope_write_test::check_all(
        {rope_table_floats_cpu, qk_norm_rope_cpu, kv_cache_write_cpu, kv_cache_norm_rope_write_cpu}, {1, 3});
    return kernel_test::report() && copies && quantised;
  });
}
