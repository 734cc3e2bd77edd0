// Record of every byte of a block's shared memory: who wrote and read it last, whether
// that is ordered before a later access, and whether an asynchronous copy to it is still under way.
//
// Accesses of two warps are ordered by block barriers alone: each starts a new epoch. Within a warp
// every synchronisation advances the warp's clock, and a lane knows of another what that lane did
// before their latest common synchronisation, `known[other]`; an access is stamped with the clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace svdq::emulator {

inline constexpr int kWarpLanes = 32;

// Who accesses, and when.
struct Agent {
  int thread;
  uint32_t epoch;
  uint32_t stamp;
  const uint32_t* known;  // [kWarpLanes]

  int warp() const { return thread / kWarpLanes; }
  int lane() const { return thread % kWarpLanes; }
};

class SharedShadow {
 public:
  explicit SharedShadow(size_t bytes) : bytes_(bytes) {}

  // Each returns what is wrong, or an empty string.
  std::string read(size_t offset, size_t bytes, const Agent& agent);
  std::string write(size_t offset, size_t bytes, const Agent& agent);
  // An atomic addition: ordered with others of the same epoch, and with nothing else in it.
  std::string add(size_t offset, size_t bytes, const Agent& agent);
  std::string begin_copy(size_t offset, size_t bytes, const Agent& agent);

  // The bytes of a copy have arrived: a write by the thread that waited.
  void end_copy(size_t offset, size_t bytes, const Agent& agent);

 private:
  struct Byte {
    int32_t write_thread = -1;
    uint32_t write_epoch = 0, write_stamp = 0;
    uint32_t read_epoch = 0, read_stamp = 0;
    uint32_t read_warps = 0;  // in read_epoch
    uint32_t read_lanes = 0;  // of read_warp, since read_stamp
    int32_t read_warp = -1;
    uint32_t add_epoch = 0;  // of the latest addition
    int32_t copied_by = -1;  // a copy in flight
  };

  static void note_write(Byte& byte, const Agent& agent);
  std::string race(const char* what, size_t offset, int other, const Agent& agent) const;

  std::vector<Byte> bytes_;
};

}  // namespace svdq::emulator
