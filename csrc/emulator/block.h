// One block under emulation: its threads, the operations they wait for, its shared memory.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "csrc/emulator/emulator.h"
#include "csrc/emulator/fiber.h"
#include "csrc/emulator/global_memory.h"
#include "csrc/emulator/recorder.h"
#include "csrc/emulator/shared_shadow.h"

namespace svdq::emulator {

using Site = std::source_location;

inline constexpr uint32_t kAllLanes = 0xffffffffu;

// A warp operation that lanes meet in. The last lane to arrive runs `combine` on the operands of
// all, [kWarpLanes], null for lanes that are not members.
struct WarpOperation {
  const char* name;
  uint32_t members;
  void (*combine)(void* const* operands);
  bool aligned;        // every lane at the same place of the source
  bool orders_memory;  // __syncwarp
};

// The constants of a launch.
struct Launch {
  const Options& options;
  const char* name;
  Dim3 grid;
  int threads;
  int smem_bytes;
  const std::function<void()>& body;
};

class Block {
 public:
  Block(const Launch& launch, Dim3 index, std::vector<std::unique_ptr<Stack>>& stacks,
        std::mt19937_64& random, Recorder& recorder);

  void run();

  // Called by the block's threads.
  static Block& current();
  int thread() const { return current_; }
  int lane() const { return current_ % kWarpLanes; }
  const Dim3& index() const { return index_; }
  const Launch& launch() const { return launch_; }
  uint8_t* shared() { return arena(); }
  bool in_shared(const void* data) const;

  void sync_threads(Site site);
  void meet(const WarpOperation& operation, void* operand, Site site);
  // Checks and counts an access to global or shared memory.
  void access(const void* data, size_t bytes, size_t alignment, Access access, Site site);
  // An addition to a count in shared memory that no other thread's comes between.
  void add_shared(const void* count, size_t bytes, Site site);
  // A row of a matrix that the whole warp loads.
  void read_row(const void* row, size_t bytes, int lane, Site site);
  void copy_async(void* shared, const void* global, int bytes, Site site);
  void commit_copies();
  void wait_copies(int pending_groups);
  [[noreturn]] void fail(const std::string& what, Site site) const;
  // For operations that the last lane carries out for others.
  [[noreturn]] void fail_at(int thread, const std::string& what, Site site) const;

 private:
  enum class State : uint8_t { kReady, kInWarpOperation, kAtBarrier, kExited };

  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int bytes;  // the rest of the 16 becomes zero
  };

  struct Thread {
    std::unique_ptr<Fiber> fiber;
    State state = State::kReady;
    Site site;  // of what it waits for
    const WarpOperation* operation = nullptr;
    void* operand = nullptr;
    std::vector<std::vector<Copy>> copy_groups;  // committed, oldest first
    std::vector<Copy> copies;                    // not yet committed
    uint32_t known[kWarpLanes] = {};             // see shared_shadow.h
  };

  // Shared memory lies between guards, so that what misses it by little is known for what it is.
  static constexpr size_t kGuardLines = 32;
  uint8_t* arena() { return arena_[kGuardLines].bytes; }
  int64_t offset(const void* data) const;
  Agent agent(int thread) const;
  void suspend();
  void run_thread(int thread);
  void exit_thread();
  void complete(const WarpOperation& operation, Site site);
  void order_memory(uint32_t members);
  void check_shared_range(const void* data, size_t bytes, size_t alignment, Site site) const;
  std::string describe(const Thread& thread) const;
  [[noreturn]] void fail_deadlock() const;
  int warp_first() const { return current_ / kWarpLanes * kWarpLanes; }

  struct alignas(128) Line {
    uint8_t bytes[128];
  };

  const Launch& launch_;
  Dim3 index_;
  std::mt19937_64& random_;
  Recorder& recorder_;
  std::vector<Thread> threads_;
  std::vector<uint32_t> warp_clock_;
  std::vector<Line> arena_;
  SharedShadow shadow_;
  uint32_t epoch_ = 1;
  int current_ = -1;
  int at_barrier_ = 0;
  int exited_ = 0;
  bool abandoned_ = false;
  std::string error_;
};

}  // namespace svdq::emulator
