// The CUDA cache write, and with it normalised and rotated keys, emulated.
#include "../../csrc/tests/kv_cache_problems.h"
#include "../../csrc/tests/norm_rope_write_problems.h"
#include "launch.h"

int main() {
  using namespace selfforcing;
  using emulation::launch;
  const bool copies = kv_cache_test::check_all(launch<kv_cache_write_cuda>, {1});
  const bool quantised = kv_cache_test::check_all_quantised(launch<kv_cache_write_cuda>, {1});
  norm_rope_write_test::check_all(
      {nullptr, launch<qk_norm_rope_cuda>, launch<kv_cache_write_cuda>, launch<kv_cache_norm_rope_write_cuda>}, {1});
  return kernel_test::report() && copies && quantised ? 0 : 1;
}
