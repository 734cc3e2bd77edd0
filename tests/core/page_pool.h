// A pool of pages for tests of the pack stages.
#pragma once

#include <vector>

#include "kernels/machine/math.h"
#include "tests/core/testing.h"

namespace svdq::testing {

// Writes a value's code where get_value_code finds it.
inline void put_value_code(uint8_t* page, const ValueLayout& value, int channel, int slot,
                           int code) {
  const int low = low_plane_width(value.bits), high = value.bits - low;
  put_code(page + value.code_offset(), value_code_address(low, channel, slot), low,
           code & ((1 << low) - 1));
  if (high > 0) {
    put_code(page + value.high_plane_offset(), value_code_address(high, channel, slot), high,
             code >> low);
  }
}

// Pages of a sequence scattered over a pool of random bytes.
struct PagePool {
  PagePool(Random& random, int64_t page_bytes, int64_t num_slots) : page_bytes(page_bytes) {
    const int64_t pages = ceil_div(num_slots, kPageTokens);
    for (int64_t i = 0; i < pages; ++i)
      table.push_back(static_cast<int32_t>((pages - 1 - i) * 2 + 1));
    bytes.resize((2 * pages + 1) * page_bytes);
    random.fill(bytes);
  }

  const uint8_t* page_of(int64_t slot) const { return page_of(slot, bytes); }
  const uint8_t* page_of(int64_t slot, const std::vector<uint8_t>& all) const {
    return all.data() + table[slot / kPageTokens] * page_bytes;
  }

  int64_t page_bytes;
  std::vector<int32_t> table;
  std::vector<uint8_t> bytes;
};

}  // namespace svdq::testing
