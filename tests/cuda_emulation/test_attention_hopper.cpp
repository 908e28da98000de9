// The attention kernels for Hopper, emulated, against the definition that the others are tested with.
//   test_attention_hopper [largest number of multiplications in a problem]
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>

#include "../../csrc/attention/cuda_dispatch.h"
#include "../../csrc/attention/cuda_hopper_fit.h"
#include "../../csrc/attention/cuda_schedule.cuh"
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
  for (const char* name : {"streams of many lengths", "a list per head", "few queries, long past"}) {
    Case c = *std::find_if(all.begin(), all.end(), [&](const Case& c) { return c.name == std::string(name); });
    c.name = "gradients of the past", c.grad_pages = true;
    all.push_back(c);
  }
  all.push_back({"gradients of the past alone",
                 1,
                 2,
                 1,
                 96,
                 {0, 9, 70},
                 {{}, {}},
                 0,
                 24,
                 {{{3, 10}, {11, 300}}},
                 1,
                 true,
                 0,
                 {},
                 true});
  for (Case& c : all) c.gaps = 8;
  return all;
}

// Pages that have to be decoded, which the forward pass takes. Every format with and without offset and rotation, page
// sizes around tiles of 96 keys, tiles that several thread blocks share.
std::vector<Case> decoding_cases() {
  std::vector<Case> all;
  const auto add = [&](const char* name, Case c, const auto& change) {
    c.name = name, c.gaps = 8;
    change(c);
    all.push_back(c);
  };
  const std::array<int32_t, 3> grid{30, 5, 4};
  const Case paged{"", 1, 2, 1, 64, {0, 70}, {{{0, 70}}}, 70, 40, {{{0, 33}, {50, 310}}}};
  const Case lists{"",
                   2,
                   4,
                   2,
                   64,
                   {0, 20, 33},
                   {{{0, 20}}, {{5, 33}}},
                   33,
                   8,
                   {{{0, 7}, {14, 60}}, {{3, 4}, {5, 5}}, {{0, 0}, {0, 0}}, {{0, 21}, {30, 230}}},
                   1,
                   true,
                   0,
                   {1.5f, -0.75f}};
  const Case few{"",          1,
                 1,           1,
                 128,         {0, 20},
                 {{{0, 20}}}, 20,
                 64,          {{{0, 100}, {130, 430}, {430, 1100}}},
                 1,           true,
                 -0.5f,       {2.5f, -1.5f, -1.5f}};
  for (PageFormat format : {PageFormat::int8, PageFormat::fp8_e4m3, PageFormat::int4}) {
    for (int dim : {40, 64, 72, 96, 128})
      if (format != PageFormat::int4 || dim % kInt4Group == 0)
        add("quantised", paged, [&](Case& c) { c.format = format, c.dim = dim, c.k_offset = dim != 64; });
    for (int page_size : {7, 96, 100})
      add("quantised, page sizes", paged, [&](Case& c) { c.format = format, c.page_size = page_size; });
    add("quantised, a list per head", lists, [&](Case& c) { c.format = format, c.dim = 96, c.k_offset = true; });
    add("quantised, long past", few, [&](Case& c) { c.format = format; });
    add("quantised and rotated", lists,
        [&](Case& c) { c.format = format, c.dim = 128, c.k_offset = true, c.rope_grid = grid; });
    add("quantised and rotated, long past", few,
        [&](Case& c) { c.format = format, c.dim = 64, c.page_size = 50, c.rope_grid = {60, 5, 4}; });
    add("quantised past alone", paged,
        [&](Case& c) { c.format = format, c.num_keys = 0, c.block_starts = {0, 9, 140}, c.spans = {{}, {}}; });
  }
  for (int dim : {40, 64, 72, 96, 128}) add("rotated", paged, [&](Case& c) { c.dim = dim, c.rope_grid = grid; });
  for (int page_size : {8, 24, 96})
    add("rotated, page sizes", paged, [&](Case& c) { c.page_size = page_size, c.rope_grid = grid; });
  add("rotated, a list per head", lists, [&](Case& c) { c.rope_grid = grid; });
  add("rotated, long past", few, [&](Case& c) { c.rope_grid = {60, 5, 4}; });
  add("rotated past alone", paged,
      [&](Case& c) { c.rope_grid = grid, c.num_keys = 0, c.block_starts = {0, 9, 140}, c.spans = {{}, {}}; });
  return all;
}

// Backward passes of which the emulated four multiprocessors split a last round: numbers of parts that do not divide
// the tiles, parts that see nothing, rows that see nothing, parts of own keys and of pages with and without a border
// within a box.
std::vector<Case> cases_with_parts() {
  std::vector<Case> all;
  for (int dim : {40, 72, 128}) {
    all.push_back({"a tile and a round", 1, 5, 5, dim, {0, 2}, {{{0, 1800}}}, 1800});
    all.push_back({"many queries on few keys", 1, 3, 1, dim, {0, 420}, {{{0, 10}}}, 10});
  }
  const Case blocks{"parts without keys",
                    1,
                    1,
                    1,
                    64,
                    {0, 2, 4, 6, 8, 10},
                    {{{3, 9}, {11, 12}}, {}, {{40, 51}}, {{0, 1300}}, {{100, 900}}},
                    1300};
  all.push_back(blocks);
  all.push_back(blocks);
  all.back().name = "parts of rows without keys", all.back().spans[0] = {};
  all.push_back({"parts without queries", 1, 2, 2, 40, {0, 920}, {{{3, 20}}}, 25});
  all.push_back({"parts of a list per head",
                 1,
                 6,
                 2,
                 96,
                 {0, 3},
                 {{{0, 33}}},
                 33,
                 24,
                 {{{0, 7}, {14, 40}}, {{0, 21}, {30, 1250}}},
                 1,
                 true,
                 -0.5f,
                 {1.5f, -0.75f}});
  all.push_back({"parts of pages with gradients",
                 1,
                 4,
                 1,
                 96,
                 {0, 200},
                 {{}},
                 0,
                 24,
                 {{{1, 5}, {9, 14}, {17, 22}, {26, 30}, {35, 45}}},
                 1,
                 true,
                 0,
                 {1, 2, -1, 0.5f, -0.5f},
                 true});
  for (Case& c : all) c.gaps = 8;
  return all;
}

// Of backward calls: those that were asked how much workspace they need, and those that need some.
int num_calls = 0, num_calls_with_parts = 0;

int64_t backward_workspace_bytes(const AttentionBackwardParams& params) {
  const int64_t bytes = attention_cuda::hopper_backward_workspace_bytes(params);
  ++num_calls, num_calls_with_parts += bytes > 0;
  return bytes;
}

// Every other launch runs the threads of a block in another order.
template <auto kLaunch, auto kFits, typename Params>
void launch(const Params& params) {
  static unsigned launches = 0;
  constexpr emulation::Order kOrders[] = {emulation::Order::forward, emulation::Order::random,
                                          emulation::Order::reverse};
  emulation::set_order(kOrders[launches % 3], launches);
  ++launches;
  if (!kFits(params)) throw std::runtime_error("the kernels do not take this call");
  emulation::launch<kLaunch>(params);
}

// Every part of every tile is one item, and those of an H100 are as docs/performance.md has them.
int check_schedule() {
  using attention_cuda::RoundSchedule;
  int failures = 0;
  const auto fail = [&](const char* what, int tiles, int columns, int processors) {
    ++failures;
    std::printf("FAILED  schedule of %d tiles over %d columns on %d multiprocessors: %s\n", tiles, columns, processors,
                what);
  };
  for (int processors : {1, 4, 7})
    for (int tiles = 0; tiles < 30; ++tiles)
      for (int columns : {0, 1, 2, 9, 100}) {
        const RoundSchedule schedule(tiles, columns, processors);
        std::vector<int> parts_of(tiles);
        for (int item = 0; item < schedule.items; ++item) {
          const attention_cuda::TilePart at = schedule.at(item);
          if (at.tile >= tiles || at.part != parts_of[at.tile]++ || at.part >= at.parts) {
            fail("an item is not the next part of a tile", tiles, columns, processors);
            break;
          }
          if (at.shared_tile != (at.parts == 1 ? -1 : at.tile - schedule.whole_tiles))
            fail("a shared tile has another's place", tiles, columns, processors);
          if (at.parts > std::max(columns, 1)) fail("more parts than columns", tiles, columns, processors);
        }
        for (int tile = 0; tile < tiles; ++tile)
          if (parts_of[tile] != (tile < schedule.whole_tiles ? 1 : schedule.parts))
            fail("a part of a tile is missing", tiles, columns, processors);
        if (schedule.blocks != std::min(schedule.items, processors))
          fail("not as many thread blocks as there is room and work for", tiles, columns, processors);
      }
  struct Known {
    int tiles, columns, whole_tiles, parts;
  };
  for (const Known& known : {Known{444, 256, 396, 8},
                             {444, 74, 396, 5},
                             {156, 256, 132, 5},
                             {156, 25, 132, 5},
                             {12, 256, 0, 11},
                             {48, 74, 0, 5},
                             {12, 1, 12, 1},
                             {132, 256, 132, 1}}) {
    const RoundSchedule schedule(known.tiles, known.columns, 132);
    if (schedule.whole_tiles != known.whole_tiles || schedule.parts != known.parts)
      fail("not as documented", known.tiles, known.columns, 132);
  }
  return failures;
}

// What the kernels must leave to others, each change alone.
int check_fits() {
  alignas(16) static char memory[32];
  AttentionParams good;
  good.dtype = DType::float16;
  good.batch = 2, good.num_heads = 4, good.num_kv_heads = 2, good.head_dim = 64, good.num_queries = good.num_keys = 10;
  good.q = {memory, 2560, 256, 64}, good.k = good.v = {memory, 1280, 128, 64}, good.out = {memory, 2560, 256, 64};
  good.past.k_pages = good.past.v_pages = memory;
  good.past.k_page_stride = good.past.v_page_stride = 8 * 128;
  good.past.k_token_stride = good.past.v_token_stride = 128;
  good.past.k_head_stride = good.past.v_head_stride = 64;
  good.past.num_pages = 3, good.past.page_size = 8;
  int failures = 0;
  const auto expect = [&](bool fits, const char* what, void (*change)(AttentionParams&)) {
    AttentionParams params = good;
    change(params);
    if (attention_cuda::fits_hopper_forward(params) == fits) return;
    ++failures;
    std::printf("FAILED  %s: %s\n", what, fits ? "not taken" : "taken");
  };
  using P = AttentionParams&;
  expect(true, "a call that fits", [](P) {});
  expect(true, "a stride that is never used", [](P p) { p.batch = 1, p.q.batch_stride = 1; });
  expect(true, "no keys of the block", [](P p) { p.num_keys = 0, p.k = p.v = {}; });
  expect(true, "no past", [](P p) { p.past = {}; });
  expect(false, "float32", [](P p) { p.dtype = DType::float32; });
  expect(false, "a small head dim", [](P p) { p.head_dim = 32; });
  expect(false, "a large head dim", [](P p) { p.head_dim = 136; });
  expect(false, "q at an odd address", [](P p) { p.q.data = memory + 8; });
  expect(false, "k at an odd address", [](P p) { p.k.data = memory + 2; });
  expect(false, "an odd stride of v", [](P p) { p.v.token_stride = 132; });
  expect(false, "an expanded k", [](P p) { p.k.batch_stride = 0; });
  expect(false, "an odd stride of out", [](P p) { p.out.head_stride = 63; });
  expect(false, "an odd stride of pages", [](P p) { p.past.v_token_stride = 130; });
  expect(false, "an odd size of pages", [](P p) { p.past.page_size = 12; });
  expect(true, "quantised pages", [](P p) { p.past.format = PageFormat::int8; });
  expect(true, "quantised pages of any size", [](P p) { p.past.format = PageFormat::int4, p.past.page_size = 7; });
  expect(true, "quantised pages, multiples of 8 bytes",
         [](P p) { p.past.format = PageFormat::int8, p.past.v_pages = memory + 8, p.past.v_token_stride = 136; });
  expect(false, "quantised pages at an odd address",
         [](P p) { p.past.format = PageFormat::int8, p.past.k_pages = memory + 4; });
  expect(false, "an odd stride of quantised pages",
         [](P p) { p.past.format = PageFormat::int8, p.past.v_head_stride = 67; });
  expect(true, "keys rotated when read", [](P p) { p.past.rope_table = reinterpret_cast<const float*>(memory); });
  expect(false, "keys rotated when read, an odd size of pages",
         [](P p) { p.past.rope_table = reinterpret_cast<const float*>(memory), p.past.page_size = 12; });
  expect(false, "a scale of zero", [](P p) { p.softmax_scale = 0; });
  return failures;
}

// A tile of queries or of keys may hold rows of another block, which must not matter, not even as zero times NaN.
void check_that_blocks_are_apart(const attention_test::Kernels& kernels) {
  for (int dim : {64, 128}) {
    Case c{"blocks apart", 1, 2, 1, dim, {0, 40, 80}, {{{0, 30}}, {{30, 70}}}, 70};
    c.gaps = 8;
    attention_test::Problem problem(c, DType::bfloat16, dim);
    const attention_test::Results whole = compute(problem, kernels, 1);
    for (int query = 40; query < 80; ++query)
      for (auto* tensor : {&problem.q, &problem.grad_out})
        tensor->fill_token(0, query, std::numeric_limits<float>::quiet_NaN());
    for (int key = 30; key < 70; ++key)
      for (auto* tensor : {&problem.k, &problem.v}) tensor->fill_token(0, key, std::numeric_limits<float>::quiet_NaN());
    const attention_test::Results half = compute(problem, kernels, 1);
    const auto same = [&](const attention_test::TestTensor& x, const attention_test::TestTensor& y, int tokens) {
      for (int token = 0; token < tokens; ++token)
        for (int head = 0; head < x.heads; ++head)
          for (int d = 0; d < dim; ++d)
            if (!(x.at(0, token, head, d) == y.at(0, token, head, d))) return false;
      return true;
    };
    if (!same(whole.out, half.out, 40) || !same(whole.grad_q, half.grad_q, 40) ||
        !same(whole.grad_k, half.grad_k, 30) || !same(whole.grad_v, half.grad_v, 30))
      attention_test::fail(problem, "NaN in another block changes results");
  }
}

}  // namespace

int main(int argc, char** argv) {
  using namespace attention_cuda;
  const attention_test::Kernels kernels{
      hopper_forward_workspace_bytes, launch<hopper_forward, fits_hopper_forward, AttentionParams>,
      backward_workspace_bytes, launch<hopper_backward, fits_hopper_backward, AttentionBackwardParams>};
  check_that_blocks_are_apart(kernels);
  const double most_multiplications = argc > 1 ? std::atof(argv[1]) : std::numeric_limits<double>::infinity();
  const auto check_all = [&](const attention_test::Kernels& kernels, const std::vector<Case>& all) {
    return attention_test::check_all(kernels, {}, most_multiplications, attention_test::kAllFeatures, all,
                                     {DType::bfloat16, DType::float16});
  };
  bool passed = check_all(kernels, hopper_cases());
  // Their gradients are left to the kernels for every GPU.
  passed = check_all({kernels.forward_workspace_bytes, kernels.forward}, decoding_cases()) && passed;
  num_calls = num_calls_with_parts = 0;
  passed = check_all(kernels, cases_with_parts()) && passed;
  if (num_calls == 0 || num_calls_with_parts != num_calls) {
    std::printf("FAILED  only %d of %d backward passes had parts\n", num_calls_with_parts, num_calls);
    passed = false;
  }
  return check_schedule() == 0 && check_fits() == 0 && passed ? 0 : 1;
}
