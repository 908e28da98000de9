// Hopper's asynchronous instructions: mbarriers and named barriers, copies of tiles, products of warpgroups.
//
// * A phase of an mbarrier ends when its arrivals and its bytes are complete. Bytes that do not come, or too many,
// leave
//   the waiting threads in a deadlock, which is reported with what the barrier misses.
// * A tile that is loaded is NaN in shared memory from the moment it is asked for (whoever still reads what was there
//   before sees it) until no thread can go on without it (whoever does not wait for it sees that, too).
// * A tile that is stored, and the factors of a product, are compared between the moment they are asked for and the
// wait
//   that covers them: shared memory that changes in between is an error.
// * The sums of a product are NaN from the call to the wait that covers it; if they are written in between, that is an
//   error. Every product needs a warpgroup_arrive since its thread's last wait, and the whole warpgroup at one place
//   with the same descriptors.
// * What ordinary stores wrote is seen by copies and products only once it was fenced and threads have met (or a copy
// or
//   product is asked for): until then reading it is an error. A fence by one thread counts for the stores of all: that
//   one of several threads forgot it is not found.
// * The race checker knows loads as threads of their own, which start where they are asked for and end at their
// barrier;
//   stores and factors are read by the asking threads, when they ask and when they wait.
//
// Not found: registers of `a` or of sums that are touched between warpgroup_arrive and the product, and registers of
// `a` in use until the wait; warps of one warpgroup that arrive, commit or wait at different places; a product whose
// descriptor needs a base offset is refused rather than computed. Register counts (setmaxnreg) are ignored.
#include <cstring>
#include <map>

#include "machine.h"

namespace selfforcing::emulation {

struct Barrier {
  int arrivals = 0;  // per phase
  int missing_arrivals = 0;
  int64_t missing_bytes = 0;
  unsigned phase = 0;
  bool shown = false;  // to copies, by fence_barrier_init
  const Fiber* owner = nullptr;
  char event[2];  // by parity of the phase
};

// 16 bytes of a factor that one thread answers for.
struct ChunkRead {
  const unsigned char* address;
  unsigned char bytes[16];
  unsigned group;
  std::source_location where;
};

// Sums of products that the thread has not waited for; their value is kept here.
struct Sums {
  float* registers;
  int size;
  unsigned group;  // of the newest product
  float value[128];
  std::source_location where;
};

struct ThreadProducts {
  bool ready = false;  // warpgroup_arrive since the last wait
  unsigned group = 0;  // of the next product
  std::vector<Sums> sums;
  std::vector<ChunkRead> reads;
};

struct Store {
  TensorMap map;
  const unsigned char* source;
  Coordinates first;
  std::vector<unsigned char> bytes;  // as they were when the store was asked for
  unsigned group;
  std::source_location where;
};

struct ThreadStores {
  unsigned group = 0;
  std::deque<Store> asked;
};

Fiber::Fiber() : products(std::make_unique<ThreadProducts>()), stores(std::make_unique<ThreadStores>()) {}
Fiber::~Fiber() = default;

namespace {

constexpr int kWarpgroupSize = 128, kProductRows = 64, kProductDepth = 16, kMostColumns = 256;
constexpr int kChunkBytes = 16, kChunk = 8;  // elements
constexpr int kMostBytes = (1 << 20) - 1;    // that an mbarrier counts

struct Load {
  TensorMap map;
  unsigned char* target;
  Coordinates first;
  Barrier* barrier;
  Engine engine;
  std::source_location where;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  unsigned round = 0;
  std::vector<unsigned> rounds_of;  // by thread
  std::vector<Fiber*> waiting;
  char event[2];
};

struct Warpgroup {
  int arrived = 0;
  std::source_location where;
  Product product[kWarpgroupSize];
  Sums* sums[kWarpgroupSize];
};

std::map<const void*, Barrier> barriers;
std::vector<Load> loads;
NamedBarrier named_barriers[16];
std::vector<Warpgroup> warpgroups;

// Shared memory as copies and products see it.
std::vector<unsigned char> async_view;
bool fence_pending = false;

unsigned char* shared_base() { return static_cast<unsigned char*>(shared_memory()); }

bool in_shared(const void* address, int64_t bytes) {
  const int64_t offset = static_cast<const unsigned char*>(address) - shared_base();
  return offset >= 0 && offset + bytes <= static_cast<int64_t>(shared_bytes);
}

bool fenced(const unsigned char* address, size_t bytes) {
  const Unseen unseen;
  return std::memcmp(address, async_view.data() + (address - shared_base()), bytes) == 0;
}

bool unchanged(const unsigned char* address, const unsigned char* before, size_t bytes) {
  const Unseen unseen;
  return std::memcmp(address, before, bytes) == 0;
}

int thread_index() { return running->thread.warp * kWarpSize + running->thread.lane; }

}  // namespace

void start_block() {
  barriers.clear();
  loads.clear();
  for (NamedBarrier& barrier : named_barriers) {
    barrier.threads = barrier.arrived = 0;
    barrier.round = 0;
    barrier.rounds_of.assign(num_threads, 0);
    barrier.waiting.clear();
  }
  warpgroups.assign(num_threads / kWarpgroupSize, {});
  async_view.assign(shared_bytes, 0xff);
  fence_pending = false;
  for (int i = 0; i < num_threads; ++i) {
    *fibers[i]->products = {};
    *fibers[i]->stores = {};
  }
}

void finish_thread() {
  const ThreadProducts& products = *running->products;
  if (!products.sums.empty()) fail(products.sums.front().where, "the thread ends before this product does");
  const ThreadStores& stores = *running->stores;
  if (!stores.asked.empty()) fail(stores.asked.front().where, "the thread ends before this store has read its tile");
}

void fence_async_proxy() { fence_pending = true; }

void publish_fenced() {
  if (!fence_pending) return;
  const Unseen unseen;
  std::memcpy(async_view.data(), shared_memory(), shared_bytes);
  fence_pending = false;
}

// ---- mbarriers

namespace {

constexpr uint64_t kStamp = 0x6d62617272696572;  // what the machine keeps in an mbarrier's 8 bytes

Barrier& barrier_at(void* address, std::source_location where) {
  note_read(address, sizeof(kStamp));
  std::map<const void*, Barrier>::iterator found;
  bool intact = false;
  {
    const Unseen unseen;
    found = barriers.find(address);
    if (found != barriers.end()) intact = std::memcmp(address, &kStamp, sizeof(kStamp)) == 0;
  }
  if (found == barriers.end()) fail(where, "an mbarrier that was not initialised");
  if (!intact) fail(where, "an mbarrier whose memory was overwritten");
  return found->second;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing_arrivals != 0 || barrier.missing_bytes != 0) return;
  ++barrier.phase;
  barrier.missing_arrivals = barrier.arrivals;
  publish_fenced();
  for (int i = 0; i < num_threads; ++i)
    if (fibers[i]->at_barrier == &barrier) fibers[i]->waits_for = nullptr;
}

}  // namespace

void barrier_init(void* address, int arrivals, std::source_location where) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(kStamp) != 0) fail(where, "an mbarrier that is not aligned to 8");
  if (arrivals < 1 || arrivals > kMostBytes) fail(where, "an mbarrier for no thread, or too many");
  note_write(address, sizeof(kStamp));
  const Unseen unseen;
  std::memcpy(address, &kStamp, sizeof(kStamp));
  Barrier& barrier = barriers[address];
  barrier = {};
  barrier.arrivals = barrier.missing_arrivals = arrivals;
  barrier.owner = running;
}

void fence_barrier_init() {
  const Unseen unseen;
  for (auto& [address, barrier] : barriers)
    if (barrier.owner == running) barrier.shown = true;
}

void barrier_arrive(void* address, int expected_bytes, std::source_location where) {
  Barrier& barrier = barrier_at(address, where);
  if (barrier.missing_arrivals == 0) fail(where, "more threads arrive at an mbarrier than it is for");
  barrier.missing_bytes += expected_bytes;
  if (expected_bytes < 0 || barrier.missing_bytes > kMostBytes) fail(where, "more bytes than an mbarrier can count");
  release(&barrier.event[barrier.phase % 2]);
  --barrier.missing_arrivals;
  end_phase_if_complete(barrier);
}

void barrier_wait(void* address, unsigned parity, std::source_location where) {
  Barrier& barrier = barrier_at(address, where);
  if (parity > 1) fail(where, "a parity that is neither 0 nor 1");
  while (barrier.phase % 2 == parity) {
    running->at_barrier = &barrier;
    wait("an mbarrier", where);
  }
  running->at_barrier = nullptr;
  acquire(&barrier.event[parity]);
}

std::string describe(const Barrier& barrier) {
  return std::to_string(barrier.missing_arrivals) + " arrivals and " + std::to_string(barrier.missing_bytes) +
         " bytes in phase " + std::to_string(barrier.phase);
}

// ---- Named barriers

void named_barrier(int id, int threads, bool waits, std::source_location where) {
  if (id < 1 || id > 15) fail(where, "a named barrier is 1 to 15");
  if (threads < kWarpSize || threads > num_threads || threads % kWarpSize != 0)
    fail(where, "a named barrier for other than whole warps of the block");
  NamedBarrier& barrier = named_barriers[id];
  if (barrier.arrived == 0)
    barrier.threads = threads;
  else if (barrier.threads != threads)
    fail(where, "a named barrier for another number of threads than it has begun with");
  unsigned& rounds = barrier.rounds_of[thread_index()];
  if (rounds == barrier.round + 1) fail(where, "a thread comes to a named barrier again before the others have come");
  rounds = barrier.round + 1;
  char* event = &barrier.event[barrier.round % 2];
  release(event);
  if (++barrier.arrived == barrier.threads) {
    barrier.arrived = 0;
    ++barrier.round;
    publish_fenced();
    const Unseen unseen;
    for (Fiber* fiber : barrier.waiting) fiber->waits_for = nullptr;
    barrier.waiting.clear();
  } else if (waits) {
    {
      const Unseen unseen;
      barrier.waiting.push_back(running);
    }
    wait("a named barrier", where);
  }
  if (waits) acquire(event);
}

// ---- Copies of tiles

namespace {

// Where the 16-byte chunk at this address is kept under a swizzle.
template <typename Byte>
Byte* swizzle(Byte* address, int row_bytes) {
  const uintptr_t place = reinterpret_cast<uintptr_t>(address);
  const uintptr_t exchanged = place >> 7 & (static_cast<uintptr_t>(row_bytes / kChunkBytes) - 1);
  return address + static_cast<intptr_t>((place ^ exchanged << 4) - place);
}

int box_row_bytes(const TensorMap& map) { return map.box[0] * map.element_bytes; }
int box_bytes(const TensorMap& map) { return box_row_bytes(map) * map.box[1] * map.box[2] * map.box[3]; }

// Calls visit(bytes of the box before this row, row in device memory or nullptr, first and end byte of what the tensor
// has of it).
template <typename Visit>
void for_each_row(const TensorMap& map, Coordinates first, const Visit& visit) {
  int64_t at[4];
  int done = 0;
  const int64_t begin = std::clamp<int64_t>(-int64_t{first.of[0]}, 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(map.sizes[0] - first.of[0], begin, map.box[0]);
  for (int i3 = 0; i3 < map.box[3]; ++i3)
    for (int i2 = 0; i2 < map.box[2]; ++i2)
      for (int i1 = 0; i1 < map.box[1]; ++i1) {
        at[1] = first.of[1] + i1, at[2] = first.of[2] + i2, at[3] = first.of[3] + i3;
        bool exists = begin < end;
        unsigned char* row = map.data;
        for (int i = 1; i < 4; ++i) {
          exists = exists && at[i] >= 0 && at[i] < map.sizes[i];
          row += at[i] * map.strides[i];
        }
        row += (first.of[0] + begin) * map.element_bytes;
        visit(done, exists ? row : nullptr, static_cast<int>(begin * map.element_bytes),
              static_cast<int>(end * map.element_bytes));
        done += box_row_bytes(map);
      }
}

void check_tile(const void* tile, const TensorMap& map, std::source_location where) {
  if (map.data == nullptr) fail(where, "a tensor map that was not encoded");
  if (reinterpret_cast<uintptr_t>(tile) % 128 != 0) fail(where, "a tile that is not aligned to 128 bytes");
  if (!in_shared(tile, box_bytes(map))) fail(where, "a tile that is not inside the block's shared memory");
}

void fill(unsigned char* target, int bytes, int value) {
  std::memset(target, value, bytes);
  std::memset(async_view.data() + (target - shared_base()), value, bytes);
}

void carry_out(Load& load) {
  const TensorMap& map = load.map;
  const int bytes = box_bytes(map);
  load.engine.act([&] {
    note_write(load.target, bytes);
    for_each_row(map, load.first, [&](int done, const unsigned char* row, int begin, int end) {
      if (row != nullptr) note_read(row, end - begin);
      const Unseen unseen;
      std::vector<unsigned char> whole(box_row_bytes(map), 0);
      if (row != nullptr) std::memcpy(whole.data() + begin, row, end - begin);
      for (int i = 0; i < box_row_bytes(map); i += kChunkBytes)
        std::memcpy(swizzle(load.target + done + i, map.row_bytes), whole.data() + i, kChunkBytes);
    });
    const Unseen unseen;
    std::memcpy(async_view.data() + (load.target - shared_base()), load.target, bytes);
  });
  load.engine.act([&] { release(&load.barrier->event[load.barrier->phase % 2]); });
  load.barrier->missing_bytes -= bytes;
  end_phase_if_complete(*load.barrier);
}

void carry_out(const Store& store) {
  const TensorMap& map = store.map;
  for_each_row(map, store.first, [&](int done, unsigned char* row, int begin, int end) {
    if (row == nullptr) return;
    note_write(row, end - begin);
    const Unseen unseen;
    std::vector<unsigned char> whole(box_row_bytes(map));
    for (int i = 0; i < box_row_bytes(map); i += kChunkBytes)
      std::memcpy(whole.data() + i,
                  store.bytes.data() + (swizzle(store.source + done + i, map.row_bytes) - store.source), kChunkBytes);
    std::memcpy(row, whole.data() + begin, end - begin);
  });
}

}  // namespace

void load_tile(void* target, const TensorMap& map, void* barrier, Coordinates first, std::source_location where) {
  check_tile(target, map, where);
  Barrier& completed = barrier_at(barrier, where);
  if (!completed.shown) fail(where, "a copy to an mbarrier that was not shown to copies (fence_barrier_init)");
  note_write(target, box_bytes(map));
  const Unseen unseen;
  fill(static_cast<unsigned char*>(target), box_bytes(map), 0xff);  // NaN in every dtype
  loads.push_back({map, static_cast<unsigned char*>(target), first, &completed, Engine(), where});
}

bool complete_a_load() {
  if (loads.empty()) return false;
  const auto next = loads.begin() + next_of(static_cast<int>(loads.size()));
  carry_out(*next);
  const Unseen unseen;
  loads.erase(next);
  return true;
}

std::string unfinished_loads() {
  return loads.empty() ? "" : describe(loads.front().where) + ": the block ends before this copy does";
}

void store_tile(const TensorMap& map, const void* source, Coordinates first, std::source_location where) {
  check_tile(source, map, where);
  publish_fenced();
  const unsigned char* bytes = static_cast<const unsigned char*>(source);
  if (!fenced(bytes, box_bytes(map)))
    fail(where, "a copy of shared memory that was written without fence_async_proxy since");
  note_read(source, box_bytes(map));
  const Unseen unseen;
  running->stores->asked.push_back(
      {map, bytes, first, std::vector<unsigned char>(bytes, bytes + box_bytes(map)), running->stores->group, where});
}

void commit_stores() { ++running->stores->group; }

void wait_for_stores_read(int newest_groups_left) {
  ThreadStores& stores = *running->stores;
  const unsigned complete = stores.group - std::min<unsigned>(stores.group, newest_groups_left);
  while (!stores.asked.empty() && stores.asked.front().group < complete) {
    const Store& store = stores.asked.front();
    note_read(store.source, store.bytes.size());
    if (!unchanged(store.source, store.bytes.data(), store.bytes.size()))
      fail(store.where, "shared memory was written before this store had read it");
    carry_out(store);
    const Unseen unseen;
    stores.asked.pop_front();
  }
}

// ---- Products of warpgroups

namespace {

// A factor in shared memory, its descriptor taken apart.
struct Factor {
  Factor(uint64_t descriptor, bool transposed, int extent)
      : transposed(transposed),
        extent(extent),
        start(shared_base() + ((descriptor & 0x3fff) << 4)),
        leading_bytes(static_cast<int64_t>((descriptor >> 16 & 0x3fff) << 4)),
        stride_bytes(static_cast<int64_t>((descriptor >> 32 & 0x3fff) << 4)),
        row_bytes(16 << (4 - (descriptor >> 62)) % 4),
        base_offset(static_cast<int>(descriptor >> 49 & 7)) {}

  bool transposed;  // neighbours are of m or n, not of k
  int extent;       // m or n
  unsigned char* start;
  int64_t leading_bytes, stride_bytes;
  int row_bytes;  // of the swizzle; 16: none
  int base_offset;

  int chunks() const { return extent * kProductDepth / kChunk; }

  // m or n, and k, of a chunk's first element.
  int outer(int chunk) const { return transposed ? chunk / kProductDepth * kChunk : chunk / 2; }
  int depth(int chunk) const { return transposed ? chunk % kProductDepth : chunk % 2 * kChunk; }

  // Layouts in units of 16 bytes: PTX ISA, "Strides" of the matrix descriptor; the same facts stand at make_gmma_desc
  // in CUTLASS (include/cute/atom/mma_traits_sm90_gmma.hpp).
  unsigned char* address(int chunk) const {
    const int o = outer(chunk), k = depth(chunk), row_chunks = row_bytes / kChunkBytes;
    int64_t offset;
    if (!transposed)
      offset = o % 8 * row_bytes + o / 8 * stride_bytes + k / kChunk * (row_chunks == 1 ? leading_bytes : kChunkBytes);
    else if (row_chunks == 1)
      offset = k % 8 * row_bytes + k / 8 * leading_bytes + o / kChunk * stride_bytes;
    else
      offset = o / kChunk % row_chunks * kChunkBytes + o / kChunk / row_chunks * leading_bytes + k % 8 * row_bytes +
               k / 8 * stride_bytes;
    return swizzle(start + offset, row_bytes);
  }

  void check(std::source_location where) const {
    const int64_t place = start - shared_base(), in_row = place % row_bytes;
    if (base_offset != 0 || (row_bytes > kChunkBytes && place % (8 * row_bytes) >= row_bytes))
      fail(where, "a matrix descriptor that does not start in the first row of its swizzle");
    if (row_bytes > kChunkBytes && (transposed ? in_row != 0 : in_row + 2 * kChunkBytes > row_bytes))
      fail(where, "a matrix descriptor that starts inside of a row so that it does not fit");
  }
};

// What one thread of the warpgroup answers for of a factor.
void ask_for(const Factor& factor, std::source_location where) {
  factor.check(where);
  ThreadProducts& products = *running->products;
  for (int chunk = thread_index() % kWarpgroupSize; chunk < factor.chunks(); chunk += kWarpgroupSize) {
    const unsigned char* address = factor.address(chunk);
    if (!in_shared(address, kChunkBytes)) fail(where, "a factor that is not inside the block's shared memory");
    if (!fenced(address, kChunkBytes))
      fail(where, "a product of shared memory that was written without fence_async_proxy since");
    note_read(address, kChunkBytes);
    const Unseen unseen;
    ChunkRead read{address, {}, products.group, where};
    std::memcpy(read.bytes, address, kChunkBytes);
    products.reads.push_back(read);
  }
}

bool is_poison(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits == 0xffffffffu;
}

void poison(float* registers, int size) { std::memset(registers, 0xff, size * sizeof(float)); }

// The sums as they are known to this thread, and NaN in their registers from here on.
Sums* take_sums(const Product& product, std::source_location where) {
  ThreadProducts& products = *running->products;
  const int size = product.columns / 2;
  for (Sums& sums : products.sums) {
    if (product.sum + size <= sums.registers || sums.registers + sums.size <= product.sum) continue;
    if (sums.registers != product.sum || sums.size != size)
      fail(where, "a product with sums that overlap those of another one under way", &sums.where);
    for (int i = 0; i < size; ++i)
      if (!is_poison(product.sum[i])) fail(where, "sums were written while in use by the product at", &sums.where);
    sums.group = products.group;
    sums.where = where;
    return &sums;
  }
  const Unseen unseen;
  Sums sums{product.sum, size, products.group, {}, where};
  std::memcpy(sums.value, product.sum, size * sizeof(float));
  poison(product.sum, size);
  products.sums.push_back(sums);
  return &products.sums.back();
}

// to[outer][k], or to[k][outer].
template <int kOuter>
void decode(const Factor& factor, float (*to_float)(uint16_t), float (*to)[kOuter]) {
  for (int chunk = 0; chunk < factor.chunks(); ++chunk) {
    uint16_t bits[kChunk];
    std::memcpy(bits, factor.address(chunk), sizeof(bits));
    for (int i = 0; i < kChunk; ++i) {
      const int outer = factor.outer(chunk) + (factor.transposed ? i : 0);
      to[factor.depth(chunk) + (factor.transposed ? 0 : i)][outer] = to_float(bits[i]);
    }
  }
}

// Most of the time of a product, on memory of the machine alone: the sanitizers need not look.
__attribute__((no_sanitize("address", "undefined"))) void add_product(const float (&left)[kProductDepth][kProductRows],
                                                                      const float (&right)[kProductDepth][kMostColumns],
                                                                      float (&total)[kProductRows][kMostColumns],
                                                                      int columns) {
  for (int row = 0; row < kProductRows; ++row)
    for (int k = 0; k < kProductDepth; ++k) {
      const float factor = left[k][row];
      for (int column = 0; column < columns; ++column) total[row][column] += factor * right[k][column];
    }
}

// For all threads, which stand still.
void multiply(Warpgroup& group) {
  const Product& product = group.product[0];
  const int columns = product.columns;
  static float left[kProductDepth][kProductRows], right[kProductDepth][kMostColumns];
  static float total[kProductRows][kMostColumns];
  if (product.a == nullptr) {
    decode(Factor(product.a_descriptor, product.a_transposed, kProductRows), product.to_float, left);
  } else {
    for (int thread = 0; thread < kWarpgroupSize; ++thread)
      for (int i = 0; i < 8; ++i) {
        const int lane = thread % kWarpSize;
        const unsigned both = group.product[thread].a[i / 2];
        left[lane % 4 * 2 + i % 2 + i / 4 * 8][thread / kWarpSize * 16 + lane / 4 + i / 2 % 2 * 8] =
            product.to_float(static_cast<uint16_t>(both >> (i % 2 * 16)));
      }
  }
  decode(Factor(product.b_descriptor, product.b_transposed, columns), product.to_float, right);
  const auto for_each_sum = [&](const auto& visit) {
    for (int thread = 0; thread < kWarpgroupSize; ++thread)
      for (int i = 0; i < columns / 2; ++i) {
        const int lane = thread % kWarpSize;
        visit(group.sums[thread]->value[i],
              total[thread / kWarpSize * 16 + lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
      }
  };
  for_each_sum([&](float value, float& sum) { sum = product.accumulate ? value : 0.0f; });
  add_product(left, right, total, columns);
  for_each_sum([](float& value, float sum) { value = sum; });
}

bool same_product(const Product& a, const Product& b) {
  return a.columns == b.columns && (a.a == nullptr) == (b.a == nullptr) && a.a_descriptor == b.a_descriptor &&
         a.b_descriptor == b.b_descriptor && a.a_transposed == b.a_transposed && a.b_transposed == b.b_transposed &&
         a.accumulate == b.accumulate;
}

}  // namespace

unsigned matrix_start(const void* start, int leading_bytes, int stride_bytes, std::source_location where) {
  const int64_t place = static_cast<const unsigned char*>(start) - shared_base();
  if (!in_shared(start, kChunkBytes)) fail(where, "a matrix that is not inside the block's shared memory");
  for (const int64_t bytes : {place, int64_t{leading_bytes}, int64_t{stride_bytes}})
    if (bytes % kChunkBytes != 0 || bytes < 0 || bytes >> 18 != 0)
      fail(where, "a matrix descriptor whose start or distances are not multiples of 16 below 2^18");
  return static_cast<unsigned>(place);
}

void warpgroup_arrive() { running->products->ready = true; }

void multiply_warpgroup(const Product& product, std::source_location where) {
  const int index = thread_index(), first = index / kWarpgroupSize * kWarpgroupSize;
  if (first + kWarpgroupSize > num_threads) fail(where, "a product by a warpgroup that is not full");
  if (!running->products->ready) fail(where, "a product without warpgroup_arrive since the last wait");
  publish_fenced();
  if (product.a == nullptr) ask_for(Factor(product.a_descriptor, product.a_transposed, kProductRows), where);
  ask_for(Factor(product.b_descriptor, product.b_transposed, product.columns), where);

  Warpgroup& group = warpgroups[index / kWarpgroupSize];
  if (group.arrived == 0)
    group.where = where;
  else if (!same_place(group.where, where))
    fail(where, "a product of a warpgroup while others wait at", &group.where);
  group.product[index - first] = product;
  group.sums[index - first] = take_sums(product, where);
  if (++group.arrived < kWarpgroupSize) {
    wait("a product of its warpgroup", where);
    return;
  }
  for (const Product& other : group.product)
    if (!same_product(product, other)) fail(where, "threads of a warpgroup ask for different products");
  {
    const Unseen unseen;
    multiply(group);
  }
  group.arrived = 0;
  for (int i = first; i < first + kWarpgroupSize; ++i) fibers[i]->waits_for = nullptr;
}

void commit_products() { ++running->products->group; }

void wait_for_products(int newest_groups_left) {
  ThreadProducts& products = *running->products;
  const unsigned complete = products.group - std::min<unsigned>(products.group, newest_groups_left);
  products.ready = false;
  for (const ChunkRead& read : products.reads) {
    if (read.group >= complete) continue;
    note_read(read.address, kChunkBytes);
    if (!unchanged(read.address, read.bytes, kChunkBytes))
      fail(read.where, "shared memory was written while this product may have read it");
  }
  for (const Sums& sums : products.sums)
    for (int i = 0; i < sums.size; ++i)
      if (!is_poison(sums.registers[i])) fail(sums.where, "sums were written while in use by this product");
  const Unseen unseen;
  for (const Sums& sums : products.sums)
    if (sums.group < complete) std::memcpy(sums.registers, sums.value, sums.size * sizeof(float));
  std::erase_if(products.reads, [&](const ChunkRead& read) { return read.group < complete; });
  std::erase_if(products.sums, [&](const Sums& sums) { return sums.group < complete; });
}

void expect_complete(const float* sum) {
  for (const Sums& sums : running->products->sums)
    if (sums.registers == sum) fail(sums.where, "a wait for sums that leaves this product under way");
}

}  // namespace selfforcing::emulation
