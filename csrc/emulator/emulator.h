// Emulation of CUDA blocks on the host, as tests and backends use it. The kernels' own view of it
// is csrc/emulator/shim.h.
//
// Blocks are independent; the threads of a block are fibers that run until they wait for each
// other (a barrier, a warp operation) or end. Every access that goes through the device layer is
// checked; what is wrong with a kernel ends its launch with an Error that names kernel, block,
// thread and source line. Launches from several host threads are independent.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/core/parallel.h"

namespace svdq::emulator {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Order of the threads of a block, whenever more than one can run.
enum class Order { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;          // of kShuffled
  bool check_shared = true;   // races, unwritten bytes, copies in flight
  bool check_global = true;   // only registered memory may be touched
  bool count = true;          // fill Counters
  int shared_limit = 232448;  // bytes a block may have; the largest of any target
  // Runs blocks side by side, where nothing is counted; null: one after another.
  const Executor* executor = nullptr;
};

// Accesses of one source line, by warp: lanes that execute a load together are one request. Memory
// moves in sectors of 32 bytes; shared memory serves, per cycle, one 4-byte word of each of 32
// banks.
struct SiteCounters {
  std::source_location site;
  bool shared;  // or global
  bool store;
  int width;  // bytes of a lane
  int64_t requests = 0;
  int64_t bytes = 0;
  int64_t transfers = 0;  // sectors, or shared-memory cycles
  int64_t ideal = 0;      // the least that these bytes could take

  std::string where() const;
};

struct Counters {
  std::vector<SiteCounters> sites;
  int64_t warp_operations = 0;
  int64_t block_barriers = 0;

  // Shared-memory cycles lost to bank conflicts, for accesses of at least `width` bytes a lane.
  int64_t bank_conflicts(int width = 1) const;
  // Global sectors moved beyond the ideal, likewise.
  int64_t wasted_sectors(int width = 1) const;
};

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

// Runs body() once for every thread. `name` is for messages. Throws Error.
Counters run_grid(const Options& options, const char* name, Dim3 grid, int threads, int smem_bytes,
                  const std::function<void()>& body);

// Tells the emulator about memory that kernels may touch, as long as this object lives. With
// `written` false a byte must be written before it is read.
class Region {
 public:
  Region(const void* data, size_t bytes, bool written = true);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

 private:
  const void* data_;
};

// Global memory with red zones at both ends, whose bytes are looked at after each launch.
class Memory {
 public:
  explicit Memory(size_t bytes, bool written);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }

 private:
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace svdq::emulator
