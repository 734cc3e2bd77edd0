// Prefetching of pages, a few lines at a time.
#pragma once

#include <cstdint>

#include "csrc/cpu/fit/range-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// One head's keys and values in a page of the sequence.
struct PagePointers {
  const uint8_t* keys;
  const uint8_t* values;
};

// Prefetches a line into the second cache: lines needed much later would fill the first.
inline void prefetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// Prefetches a few lines at a time all along a page: those of the next page into the nearest cache and those of the
// page after the next into the second, keys and then values. Pages lie too far apart for hardware prefetching, and a
// core waits when it requests more lines than it has miss buffers. A line that is already in the second cache occupies
// a buffer of the first only for a moment.
struct Prefetcher {
  struct Range {
    uintptr_t at, end;
    uintptr_t after;  // offset to the same line of the page after the next
  };
  Range now, then;

  static Range range(const uint8_t* next, const uint8_t* after, int64_t bytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(next);
    return {at, at + bytes, reinterpret_cast<uintptr_t>(after) - at};
  }
  Prefetcher(const PagePointers& next, const PagePointers& after, int64_t key_bytes,
             int64_t value_bytes)
      : now(range(next.keys, after.keys, key_bytes)),
        then(range(next.values, after.values, value_bytes)) {}

  // Only one number changes per line: the compiler would store two as a vector.
  [[gnu::always_inline]] void fetch(int lines) {
    for (; lines > 0; --lines) {
      if (now.at >= now.end) {
        if (then.at >= then.end) return;
        now = then;
        then.at = then.end;
      }
      __builtin_prefetch(reinterpret_cast<const void*>(now.at));
      prefetch_line(reinterpret_cast<const uint8_t*>(now.at + now.after));
      now.at += kLineBytes;
    }
  }
  // Lines to fetch at each of `times` calls so that none is left.
  int share(int times) const {
    const int left = static_cast<int>((now.end - now.at + then.end - then.at) / kLineBytes);
    return static_cast<int>(ceil_div(left, times));
  }
};

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
