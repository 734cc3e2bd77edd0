#include "csrc/core/bit_plan.h"

#include <algorithm>

#include "csrc/core/error.h"
#include "csrc/core/layout.h"

namespace svdq {

Bands plan_schedule(int head_dim, const std::vector<int64_t>& schedule) {
  check_head_dim(head_dim);
  const auto num_groups = static_cast<int64_t>(schedule.size());
  SVDQ_CHECK(num_groups > 0 && num_groups <= head_dim,
             "schedule must have 1 to head_dim = ", head_dim, " groups, got ", num_groups);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t bits = schedule[g];
    SVDQ_CHECK(bits == 8 || bits == 4 || bits == 2 || bits == 1 || bits == 0, "schedule: group ", g,
               " must have 8, 4, 2, 1 or 0 bits, got ", bits);
    SVDQ_CHECK(g == 0 || bits <= schedule[g - 1], "schedule must not increase: group ", g, " has ",
               bits, " bits after ", schedule[g - 1]);
  }
  SVDQ_CHECK(schedule[0] > 0, "schedule must give bits to at least one group");

  Bands bands{};
  int64_t assigned = 0;
  int64_t group = 0;
  for (int w = 0; w < kNumWidths; ++w) {
    while (group < num_groups && schedule[group] == kWidths[w]) ++group;
    // Channels that groups 0 .. group - 1 hold; where D is no multiple of the group count, rounded
    // up.
    const int64_t wanted = (group * head_dim + num_groups - 1) / num_groups - assigned;
    const int64_t granularity = band_granularity(kWidths[w]);
    // What is left may be no whole number of granules (1-bit channels at the very end): stop before
    // it.
    const int64_t room = (head_dim - assigned) / granularity * granularity;
    const int64_t count = std::min(
        (std::max<int64_t>(wanted, 0) + granularity - 1) / granularity * granularity, room);
    bands.count[w] = static_cast<int>(count);
    assigned += count;
  }
  return bands;
}

}  // namespace svdq
