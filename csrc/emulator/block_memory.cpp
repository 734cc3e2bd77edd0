// Accesses of a block's threads to memory, and their asynchronous copies to shared memory.
#include <cstring>

#include "csrc/core/error.h"
#include "csrc/emulator/block.h"

namespace svdq::emulator {
namespace {

constexpr size_t kCopyBytes = 16;

}  // namespace

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

}  // namespace svdq::emulator
