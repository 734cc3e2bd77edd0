#include "csrc/emulator/shared_shadow.h"

#include <bit>

#include "csrc/core/error.h"

namespace svdq::emulator {
namespace {

// Did `other` of the same block do what it stamped so before the agent's latest synchronisation?
bool ordered(const Agent& agent, int other, uint32_t epoch, uint32_t stamp) {
  if (other == agent.thread || epoch != agent.epoch) return true;
  return other / kWarpLanes == agent.warp() && agent.known[other % kWarpLanes] > stamp;
}

std::string in_flight(size_t offset, int thread) {
  return join("touches byte ", offset, " of shared memory, to which thread ", thread,
              " has an asynchronous copy in flight (wait for it first)");
}

}  // namespace

std::string SharedShadow::race(const char* what, size_t offset, int other,
                               const Agent& agent) const {
  return join("race on byte ", offset, " of shared memory: ", what, " thread ", other,
              other / kWarpLanes == agent.warp() ? " of the same warp without a __syncwarp between"
                                                 : " of another warp without a barrier between");
}

std::string SharedShadow::read(size_t offset, size_t bytes, const Agent& agent) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = bytes_[i];
    if (byte.copied_by >= 0) return in_flight(i, byte.copied_by);
    if (byte.write_thread < 0) return join("reads byte ", i, " of shared memory, unwritten");
    if (byte.add_epoch == agent.epoch)
      return race("reads what was added to by", i, byte.write_thread, agent);
    if (!ordered(agent, byte.write_thread, byte.write_epoch, byte.write_stamp))
      return race("reads what was written by", i, byte.write_thread, agent);
    if (byte.read_epoch != agent.epoch) {
      byte.read_epoch = agent.epoch;
      byte.read_warps = 0;
      byte.read_warp = -1;
    }
    byte.read_warps |= 1u << agent.warp();
    if (byte.read_warp != agent.warp()) {
      byte.read_warp = agent.warp();
      byte.read_lanes = 0;
    }
    // Earlier readers that this one is ordered after need not be remembered.
    for (uint32_t rest = byte.read_lanes; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (agent.known[lane] > byte.read_stamp) byte.read_lanes &= ~(1u << lane);
    }
    byte.read_lanes |= 1u << agent.lane();
    byte.read_stamp = agent.stamp;
  }
  return {};
}

void SharedShadow::note_write(Byte& byte, const Agent& agent) {
  byte.write_thread = agent.thread;
  byte.write_epoch = agent.epoch;
  byte.write_stamp = agent.stamp;
  byte.read_warps = byte.read_lanes = 0;
  byte.read_warp = -1;
}

std::string SharedShadow::write(size_t offset, size_t bytes, const Agent& agent) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = bytes_[i];
    if (byte.copied_by >= 0) return in_flight(i, byte.copied_by);
    if (byte.add_epoch == agent.epoch)
      return race("writes what was added to by", i, byte.write_thread, agent);
    if (byte.write_thread >= 0 &&
        !ordered(agent, byte.write_thread, byte.write_epoch, byte.write_stamp))
      return race("writes what was written by", i, byte.write_thread, agent);
    if (byte.read_epoch == agent.epoch) {
      if (const uint32_t others = byte.read_warps & ~(1u << agent.warp()))
        return race("writes what was read by a thread of the warp of", i,
                    std::countr_zero(others) * kWarpLanes, agent);
      for (uint32_t rest = byte.read_lanes; rest; rest &= rest - 1) {
        const int other = agent.warp() * kWarpLanes + std::countr_zero(rest);
        if (!ordered(agent, other, byte.read_epoch, byte.read_stamp))
          return race("writes what was read by", i, other, agent);
      }
    }
    note_write(byte, agent);
  }
  return {};
}

std::string SharedShadow::add(size_t offset, size_t bytes, const Agent& agent) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (bytes_[i].add_epoch == agent.epoch) continue;
    std::string wrong = read(i, 1, agent);
    if (wrong.empty()) wrong = write(i, 1, agent);
    if (!wrong.empty()) return wrong;
    bytes_[i].add_epoch = agent.epoch;
  }
  return {};
}

std::string SharedShadow::begin_copy(size_t offset, size_t bytes, const Agent& agent) {
  std::string wrong = write(offset, bytes, agent);
  if (!wrong.empty()) return wrong;
  for (size_t i = offset; i < offset + bytes; ++i) bytes_[i].copied_by = agent.thread;
  return {};
}

void SharedShadow::end_copy(size_t offset, size_t bytes, const Agent& agent) {
  for (size_t i = offset; i < offset + bytes; ++i) {
    bytes_[i].copied_by = -1;
    note_write(bytes_[i], agent);
  }
}

}  // namespace svdq::emulator
