// A gather problem of random pages and slots, and its answer code by code.
#pragma once

#include <vector>

#include "kernels/machine/math.h"
#include "tests/core/testing.h"

namespace svdq::testing {

struct GatherCase {
  RopeMode rope = RopeMode::kPre;
  int head_dim = 64;
  HeadBands bands = {{{4, 8, 4, 8}}, {{0, 12, 4, 16}}};
  HeadBands pre_bands = {};  // hybrid only
  ValueBits v_bits = 4;
  int batch = 2;
  int num_pages = 4;    // of a sequence
  int num_slots = 130;  // of a list; lists differ in length
};

class GatherProblem {
 public:
  GatherProblem(const GatherCase& c, uint64_t stream);

  // Parameters for a backend, with room for the answer.
  GatherParams params();
  void run(const Backend& backend, const Executor& executor) { backend.gather(params(), executor); }

  std::vector<uint8_t> k_out, v_out;
  std::vector<uint8_t> expected_keys() const;
  std::vector<uint8_t> expected_values() const;

 private:
  // Calls fn(h, from, slot, to, token) for every slot of every list: its page and its slot there, and its page and slot
  // in the output.
  template <typename Fn>
  void for_each_slot(const Fn& fn) const;
  int64_t out_pages() const { return ceil_div(c_.num_slots, kPageTokens); }

  GatherCase c_;
  Layout layout_;
  std::vector<uint8_t> k_pages_, v_pages_;
  std::vector<int32_t> table_, slots_;
};

}  // namespace svdq::testing
