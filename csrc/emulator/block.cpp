#include "csrc/emulator/block.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "csrc/core/error.h"

namespace svdq::emulator {
namespace {

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

}  // namespace svdq::emulator
