#include "csrc/emulator/block.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "csrc/core/check.h"

namespace svdq::emulator {
namespace {

constexpr size_t kCopyBytes = 16;

thread_local Block* current_block = nullptr;

// Thrown inside the threads of a block that is given up.
struct Abandoned {};

std::string file_line(Site site) { return join(site.file_name(), ":", site.line()); }

}  // namespace

Block& Block::current() {
  if (!current_block) throw Error("device code called outside an emulated kernel");
  return *current_block;
}

Block::Block(const Launch& launch, Dim3 index, std::vector<std::unique_ptr<Stack>>& stacks,
             std::mt19937_64& random, Recorder& recorder)
    : launch_(launch),
      index_(index),
      random_(random),
      recorder_(recorder),
      threads_(launch.threads),
      warp_clock_((launch.threads + kWarpLanes - 1) / kWarpLanes),
      arena_(2 * kGuardLines + (launch.smem_bytes + sizeof(Line) - 1) / sizeof(Line)),
      shadow_(launch.options.check_shared ? launch.smem_bytes : 0) {
  std::memset(static_cast<void*>(arena_.data()), 0xff, arena_.size() * sizeof(Line));  // NaN
  while (static_cast<int>(stacks.size()) < launch.threads)
    stacks.push_back(std::make_unique<Stack>());
  for (int t = 0; t < launch.threads; ++t)
    threads_[t].fiber = std::make_unique<Fiber>(*stacks[t], [this, t] { run_thread(t); });
  recorder_.start(static_cast<int>(warp_clock_.size()));
}

void Block::run() {
  current_block = this;
  std::vector<int> ready(threads_.size());
  while (exited_ < static_cast<int>(threads_.size())) {
    ready.clear();
    for (int t = 0; t < static_cast<int>(threads_.size()); ++t) {
      if (threads_[t].state == State::kReady) ready.push_back(t);
    }
    if (launch_.options.order == Order::kReverse) std::reverse(ready.begin(), ready.end());
    if (launch_.options.order == Order::kShuffled)
      std::shuffle(ready.begin(), ready.end(), random_);
    try {
      if (ready.empty()) fail_deadlock();
    } catch (const Error& error) {
      error_ = error.what();
    }
    for (int t : ready) {
      current_ = t;
      threads_[t].fiber->resume();
      if (!error_.empty()) break;
    }
    if (error_.empty()) continue;
    // Let the other threads unwind their stacks.
    abandoned_ = true;
    for (int t = 0; t < static_cast<int>(threads_.size()); ++t) {
      current_ = t;
      if (threads_[t].state != State::kExited) threads_[t].fiber->resume();
    }
    current_block = nullptr;
    throw Error(error_);
  }
  for (size_t warp = 0; warp < warp_clock_.size(); ++warp) recorder_.flush(static_cast<int>(warp));
  current_block = nullptr;
}

void Block::run_thread(int thread) {
  try {
    if (!abandoned_) {
      launch_.body();
      exit_thread();
    }
  } catch (const Abandoned&) {
  } catch (const std::exception& error) {
    error_ = error.what();
  }
  threads_[thread].state = State::kExited;
  ++exited_;
}

void Block::exit_thread() {
  const Thread& self = threads_[current_];
  bool in_flight = !self.copies.empty();
  for (const auto& group : self.copy_groups) in_flight |= !group.empty();
  if (in_flight) fail("ends while its asynchronous copies are in flight", self.site);
  for (int t = 0; t < static_cast<int>(threads_.size()); ++t) {
    const Thread& other = threads_[t];
    if (other.state == State::kAtBarrier)
      fail_at(t, join("barrier divergence: waits while thread ", current_, " has exited"),
              other.site);
    if (other.state == State::kInWarpOperation && t / kWarpLanes == current_ / kWarpLanes &&
        (other.operation->members >> lane() & 1))
      fail_at(t, join(other.operation->name, " names lane ", lane(), ", which has exited"),
              other.site);
  }
}

void Block::suspend() {
  threads_[current_].fiber->suspend();
  if (abandoned_) throw Abandoned{};
}

std::string Block::describe(const Thread& thread) const {
  const std::string what =
      thread.state == State::kAtBarrier ? "a block barrier"
      : thread.state == State::kInWarpOperation
          ? join(thread.operation->name, " of lanes ", std::hex, "0x", thread.operation->members)
          : "nothing";
  return join("waits for ", what, " at ", file_line(thread.site));
}

void Block::fail_deadlock() const {
  std::string text;
  std::string last;
  for (size_t t = 0; t < threads_.size(); ++t) {
    if (threads_[t].state == State::kExited) continue;
    const std::string now = describe(threads_[t]);
    if (now != last) text += join("\n  from thread ", t, " on: ", now);
    last = now;
  }
  fail_at(0, "deadlock, these threads cannot meet:" + text, Site::current());
}

void Block::fail_at(int thread, const std::string& what, Site site) const {
  throw Error(join("kernel ", launch_.name, ", block (", index_.x, ", ", index_.y, ", ", index_.z,
                   "), thread ", thread, ": ", what, " [", file_line(site), "]"));
}

void Block::fail(const std::string& what, Site site) const { fail_at(current_, what, site); }

void Block::sync_threads(Site site) {
  Thread& self = threads_[current_];
  if (exited_ > 0) fail("barrier divergence: waits while another thread has exited", site);
  self.state = State::kAtBarrier;
  self.site = site;
  if (++at_barrier_ < static_cast<int>(threads_.size())) {
    suspend();
    return;
  }
  for (size_t t = 0; t < threads_.size(); ++t) {
    const Site other = threads_[t].site;
    if (other.line() != site.line() || other.column() != site.column() ||
        std::strcmp(other.file_name(), site.file_name()) != 0)
      fail(join("barrier divergence: thread ", t, " waits at ", file_line(other)), site);
  }
  at_barrier_ = 0;
  ++epoch_;
  recorder_.counters().block_barriers += 1;
  for (size_t warp = 0; warp < warp_clock_.size(); ++warp) recorder_.flush(static_cast<int>(warp));
  for (Thread& thread : threads_) thread.state = State::kReady;
}

void Block::meet(const WarpOperation& operation, void* operand, Site site) {
  Thread& self = threads_[current_];
  if (!(operation.members >> lane() & 1))
    fail(join(operation.name, " is executed by lane ", lane(), ", which its mask leaves out"),
         site);
  self.state = State::kInWarpOperation;
  self.site = site;
  self.operation = &operation;
  self.operand = operand;
  bool complete_now = true;
  for (uint32_t rest = operation.members; rest; rest &= rest - 1) {
    const int other = warp_first() + std::countr_zero(rest);
    if (other >= static_cast<int>(threads_.size()) || threads_[other].state == State::kExited)
      fail(join(operation.name, " names lane ", other % kWarpLanes, ", which has exited"), site);
    if (threads_[other].state != State::kInWarpOperation ||
        threads_[other].operation->members != operation.members)
      complete_now = false;
  }
  complete_now ? complete(operation, site) : suspend();
}

void Block::complete(const WarpOperation& operation, Site site) {
  void* operands[kWarpLanes] = {};
  for (uint32_t rest = operation.members; rest; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const Thread& other = threads_[warp_first() + lane];
    if (std::strcmp(other.operation->name, operation.name) != 0)
      fail(join(operation.name, " meets ", other.operation->name, " of lane ", lane, " at ",
                file_line(other.site)),
           site);
    if (operation.aligned &&
        (other.site.line() != site.line() || other.site.column() != site.column()))
      fail(join(operation.name, " must be executed by the warp together, but lane ", lane,
                " is at ", file_line(other.site)),
           site);
    operands[lane] = other.operand;
  }
  operation.combine(operands);
  if (operation.orders_memory) order_memory(operation.members);
  if (operation.members == kAllLanes) recorder_.flush(current_ / kWarpLanes);
  recorder_.counters().warp_operations += 1;
  for (uint32_t rest = operation.members; rest; rest &= rest - 1)
    threads_[warp_first() + std::countr_zero(rest)].state = State::kReady;
}

void Block::order_memory(uint32_t members) {
  // What one member knew, all know now; of each other they know everything.
  uint32_t known[kWarpLanes] = {};
  for (uint32_t rest = members; rest; rest &= rest - 1) {
    const uint32_t* own = threads_[warp_first() + std::countr_zero(rest)].known;
    for (int lane = 0; lane < kWarpLanes; ++lane) known[lane] = std::max(known[lane], own[lane]);
  }
  const uint32_t now = ++warp_clock_[current_ / kWarpLanes];
  for (uint32_t rest = members; rest; rest &= rest - 1) known[std::countr_zero(rest)] = now;
  for (uint32_t rest = members; rest; rest &= rest - 1)
    std::copy_n(known, kWarpLanes, threads_[warp_first() + std::countr_zero(rest)].known);
}

bool Block::in_shared(const void* data) const {
  const auto* at = static_cast<const uint8_t*>(data);
  const auto* begin = reinterpret_cast<const uint8_t*>(arena_.data());
  return at >= begin && at < begin + arena_.size() * sizeof(Line);
}

int64_t Block::offset(const void* data) const {
  return static_cast<const uint8_t*>(data) - arena_[kGuardLines].bytes;
}

Agent Block::agent(int thread) const {
  return {thread, epoch_, warp_clock_[thread / kWarpLanes], threads_[thread].known};
}

void Block::check_shared_range(const void* data, size_t bytes, size_t alignment, Site site) const {
  const int64_t begin = offset(data), end = begin + static_cast<int64_t>(bytes);
  if (begin < 0 || end > launch_.smem_bytes)
    fail(join("out of bounds: bytes ", begin, " to ", end, " of ", launch_.smem_bytes,
              " bytes of shared memory"),
         site);
  if (static_cast<size_t>(begin) % alignment != 0)
    fail(join("misaligned: ", bytes, " bytes at byte ", begin, " of shared memory"), site);
}

void Block::access(const void* data, size_t bytes, size_t alignment, Access access, Site site) {
  const bool shared = in_shared(data);
  std::string wrong;
  if (shared) {
    check_shared_range(data, bytes, alignment, site);
    if (launch_.options.check_shared)
      wrong = access == Access::kRead ? shadow_.read(offset(data), bytes, agent(current_))
                                      : shadow_.write(offset(data), bytes, agent(current_));
  } else {
    if (reinterpret_cast<uintptr_t>(data) % alignment != 0)
      fail(join("misaligned: ", bytes, " bytes at address ", data), site);
    if (launch_.options.check_global) wrong = check_global(data, bytes, access);
  }
  if (!wrong.empty()) fail(wrong, site);
  if (!launch_.options.count) return;
  const uintptr_t address =
      shared ? static_cast<uintptr_t>(offset(data)) : reinterpret_cast<uintptr_t>(data);
  recorder_.add(current_ / kWarpLanes,
                {site, address, static_cast<int>(bytes), lane(), shared, access == Access::kWrite});
}

void Block::add_shared(const void* count, size_t bytes, Site site) {
  if (!in_shared(count)) fail("adds to what is not shared memory", site);
  check_shared_range(count, bytes, bytes, site);
  if (!launch_.options.check_shared) return;
  const std::string wrong = shadow_.add(offset(count), bytes, agent(current_));
  if (!wrong.empty()) fail(wrong, site);
}

void Block::read_row(const void* row, size_t bytes, int lane, Site site) {
  const int thread = warp_first() + lane;
  if (!in_shared(row)) fail_at(thread, "reads a matrix row that is not in shared memory", site);
  check_shared_range(row, bytes, bytes, site);
  if (launch_.options.check_shared) {
    const std::string wrong = shadow_.read(offset(row), bytes, agent(thread));
    if (!wrong.empty()) fail_at(thread, wrong, site);
  }
  if (launch_.options.count)
    recorder_.add(thread / kWarpLanes, {site, static_cast<uintptr_t>(offset(row)),
                                        static_cast<int>(bytes), lane, true, false});
}

void Block::copy_async(void* shared, const void* global, int bytes, Site site) {
  if (!in_shared(shared)) fail("copies asynchronously to what is not shared memory", site);
  if (bytes < 0 || bytes > static_cast<int>(kCopyBytes))
    fail(join("copies ", bytes, " of 16 bytes"), site);
  check_shared_range(shared, kCopyBytes, kCopyBytes, site);
  if (bytes > 0) access(global, static_cast<size_t>(bytes), kCopyBytes, Access::kRead, site);
  if (launch_.options.check_shared) {
    const std::string wrong = shadow_.begin_copy(offset(shared), kCopyBytes, agent(current_));
    if (!wrong.empty()) fail(wrong, site);
  }
  if (launch_.options.count)
    recorder_.add(current_ / kWarpLanes, {site, static_cast<uintptr_t>(offset(shared)),
                                          static_cast<int>(kCopyBytes), lane(), true, true});
  threads_[current_].site = site;
  threads_[current_].copies.push_back(
      {static_cast<uint8_t*>(shared), static_cast<const uint8_t*>(global), bytes});
}

void Block::commit_copies() {
  Thread& self = threads_[current_];
  self.copy_groups.push_back(std::move(self.copies));
  self.copies.clear();
}

void Block::wait_copies(int pending_groups) {
  Thread& self = threads_[current_];
  while (static_cast<int>(self.copy_groups.size()) > pending_groups) {
    for (const Copy& copy : self.copy_groups.front()) {
      std::memset(copy.to, 0, kCopyBytes);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
      if (launch_.options.check_shared)
        shadow_.end_copy(offset(copy.to), kCopyBytes, agent(current_));
    }
    self.copy_groups.erase(self.copy_groups.begin());
  }
}

Counters run_grid(const Options& options, const char* name, Dim3 grid, int threads, int smem_bytes,
                  const std::function<void()>& body) {
  const auto refuse = [&](const auto&... parts) {
    throw Error(join("kernel ", name, ": ", parts...));
  };
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535)
    refuse("the grid is (", grid.x, ", ", grid.y, ", ", grid.z, ")");
  if (threads < 1 || threads > 1024) refuse(threads, " threads in a block");
  if (smem_bytes < 0 || smem_bytes > options.shared_limit)
    refuse(smem_bytes, " bytes of shared memory, the limit is ", options.shared_limit);
  if (options.count && options.executor) refuse("counting takes blocks one after another");
  if (options.count && options.executor) refuse("counting takes blocks one after another");
  const Launch launch{options, name, grid, threads, smem_bytes, body};
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const auto run = [&](int64_t block, std::mt19937_64& random, Recorder& recorder) {
    thread_local std::vector<std::unique_ptr<Stack>> stacks;
    const auto of = [&](int64_t by, int count) { return static_cast<int>(block / by % count); };
    const Dim3 index{of(1, grid.x), of(grid.x, grid.y), of(int64_t{grid.x} * grid.y, grid.z)};
    Block(launch, index, stacks, random, recorder).run();
  };
  Counters counters;
  if (options.executor) {
    const auto task = [&](int64_t block) {
      std::mt19937_64 random(options.seed + static_cast<uint64_t>(block));
      Counters unused;
      Recorder recorder(unused);
      run(block, random, recorder);
    };
    options.executor->run(
        blocks,
        [](void* context, int64_t block, int) { (*static_cast<decltype(task)*>(context))(block); },
        const_cast<void*>(static_cast<const void*>(&task)));
  } else {
    std::mt19937_64 random(options.seed);
    Recorder recorder(counters);
    for (int64_t block = 0; block < blocks; ++block) run(block, random, recorder);
  }
  check_red_zones(name);
  return counters;
}

}  // namespace svdq::emulator
