// Groups the accesses of lanes into the requests of a warp, and counts what they cost.
#pragma once

#include <cstdint>
#include <map>
#include <source_location>
#include <vector>

#include "csrc/emulator/emulator.h"

namespace svdq::emulator {

// One access of one lane. Lanes run apart, so those that belong together are found again: the n-th
// access of each lane at one place of the source, in one instance of a template, since the warp
// last met.
struct LaneAccess {
  std::source_location site;
  uintptr_t address;  // shared: offset
  int bytes;
  int lane;
  bool shared;
  bool store;
};

class Recorder {
 public:
  explicit Recorder(Counters& counters) : counters_(counters) {}

  void start(int num_warps) { pending_.assign(num_warps, {}); }
  void add(int warp, const LaneAccess& access) { pending_[warp].push_back(access); }
  // The warp met: what its lanes did until here belongs together.
  void flush(int warp);
  Counters& counters() { return counters_; }

 private:
  void count(const std::vector<const LaneAccess*>& request);

  struct Key {
    const char* file;
    const char* function;
    uint32_t line, column;
    bool shared, store;
    int bytes;
    auto operator<=>(const Key&) const = default;
  };
  static Key key(const LaneAccess& access);

  Counters& counters_;
  std::map<Key, size_t> sites_;
  std::vector<std::vector<LaneAccess>> pending_;
};

}  // namespace svdq::emulator
