// The CUDA cache write, emulated.
#include "../../csrc/tests/kv_cache_problems.h"
#include "launch.h"

int main() {
  using namespace selfforcing;
  const bool copies = kv_cache_test::check_all(emulation::launch<kv_cache_write_cuda>, {1});
  return kv_cache_test::check_all_quantised(emulation::launch<kv_cache_write_cuda>, {1}) && copies ? 0 : 1;
}
