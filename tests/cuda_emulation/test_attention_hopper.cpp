// The attention kernels for Hopper, emulated, against the definition that the others are tested with.
//   test_attention_hopper [largest number of multiplications in a problem]
#include <cstdlib>
#include <limits>

#include "../../csrc/attention/cuda_dispatch.h"
#include "../../csrc/attention/cuda_hopper_fit.h"
#include "../../csrc/tests/attention_problems.h"
#include "launch.h"

namespace {

using namespace selfforcing;
using attention_test::Case;

// Head dims with and without padding to those of the kernels, lengths around their tiles, and pages of which a tile
// takes one box and many.
std::vector<Case> hopper_cases() {
  std::vector<Case> all;
  for (int dim : {40, 64, 72, 96, 104, 128}) {
    all.push_back({"dims", 2, 2, 1, dim, {0, 37}, {{{0, 53}}}, 53});
    all.push_back({"several tiles", 1, 1, 1, dim, {0, 200}, {{{3, 500}}}, 501});
    all.push_back({"pages", 1, 2, 1, dim, {0, 70}, {{{0, 70}}}, 70, 64, {{{0, 64}, {100, 420}}}});
  }
  for (int length : {1, 64, 65, 128, 129, 192, 193, 321})
    all.push_back({"lengths", 1, 1, 1, 64, {0, length}, {{{0, length + 1}}}, length + 1});
  all.push_back(attention_test::block_causal("block causal", 2, 2, 64, 4, 90));
  all.push_back(attention_test::block_causal("blocks beside tiles", 1, 2, 128, 5, 29));
  all.push_back(attention_test::block_causal("more blocks than lanes", 1, 1, 64, 35, 2));
  all.push_back(
      {"window and sink", 2, 4, 2, 96, {0, 70, 140, 210}, {{{0, 70}}, {{0, 140}}, {{0, 30}, {150, 210}}}, 210});
  all.push_back({"unseen keys and empty rows", 2, 2, 2, 64, {0, 5, 21, 30}, {{{3, 9}, {11, 12}}, {}, {{40, 51}}}, 70});
  all.push_back({"no queries", 2, 2, 2, 64, {0}, {}, 12});
  all.push_back({"no keys", 2, 2, 2, 64, {0, 12}, {{}}, 0});
  all.push_back({"no batch", 0, 2, 2, 64, {0, 12}, {{{0, 12}}}, 12});
  all.push_back({"sharp softmax", 1, 1, 1, 64, {0, 40}, {{{0, 300}}}, 300, 0, {}, 1, true, 3.0f});
  all.push_back({"negative scale", 1, 1, 1, 64, {0, 40}, {{{0, 60}}}, 60, 0, {}, 1, true, -1.5f});
  for (int page_size : {8, 24, 48, 128})
    all.push_back({"page sizes", 1, 1, 1, 128, {0, 20}, {{{0, 20}}}, 20, page_size, {{{5, 41}, {60, 333}}}});
  all.push_back({"past alone", 2, 2, 1, 64, {0, 9, 20}, {{}, {{2, 4}}}, 6, 16, {{{3, 10}}, {{0, 0}}}});
  all.push_back({"streams of many lengths",
                 5,
                 4,
                 2,
                 64,
                 {0, 20},
                 {{{0, 20}}},
                 20,
                 16,
                 {{{0, 0}, {0, 9}}, {{0, 48}, {60, 300}}, {{5, 17}, {17, 17}}, {{0, 0}, {0, 0}}, {{0, 1}, {2, 73}}},
                 1,
                 true,
                 0,
                 {-3, 0.5f}});
  all.push_back({"a list per head",
                 2,
                 4,
                 2,
                 40,
                 {0, 33},
                 {{{0, 33}}},
                 33,
                 8,
                 {{{0, 7}, {14, 60}}, {{3, 4}, {5, 5}}, {{0, 0}, {0, 0}}, {{0, 21}, {30, 200}}},
                 1,
                 true,
                 0,
                 {1.5f, -0.75f}});
  all.push_back({"few queries, long past",
                 1,
                 1,
                 1,
                 128,
                 {0, 20},
                 {{{0, 20}}},
                 20,
                 64,
                 {{{0, 100}, {130, 430}, {430, 1800}}},
                 1,
                 true,
                 -0.5f,
                 {2.5f, -1.5f, -1.5f}});
  for (Case& c : all) c.gaps = 8;
  return all;
}

void forward(const AttentionParams& params) {
  static unsigned launches = 0;
  constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::random,
                                          emulation::Order::reverse};
  emulation::set_order(kOrders[launches % 3], launches);
  ++launches;
  if (!attention_cuda::fits_hopper_forward(params)) throw std::runtime_error("the kernels do not take this call");
  emulation::launch<attention_cuda::hopper_forward>(params);
}

}  // namespace

int main(int argc, char** argv) {
  const attention_test::Kernels kernels{attention_cuda::hopper_forward_workspace_bytes, forward};
  const double most_multiplications = argc > 1 ? std::atof(argv[1]) : std::numeric_limits<double>::infinity();
  return attention_test::check_all(kernels, {}, most_multiplications, attention_test::kAllFeatures, hopper_cases(),
                                   {DType::bfloat16, DType::float16})
             ? 0
             : 1;
}
