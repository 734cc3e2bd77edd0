// Bit widths of latent channels by a schedule.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/format.h"

namespace svdq {

// The paper's allocation (SVDq, section 4.3): head_dim channels in order of falling variance are
// cut into schedule.size() equal groups, group g gets schedule[g] bits. Neighbouring groups of one width that
// would not end on a whole line of codes is extended by the next channels. Throws Error for a
// schedule that does not fit.
Bands plan_schedule(int head_dim, const std::vector<int64_t>& schedule);

}  // namespace svdq
