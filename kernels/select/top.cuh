// The tokens of largest weight, the earlier of equals, with the outliers, in ascending order.
//
// A block per sequence and head. Weights are floats of at least 0, so their bits, as integers, are in
// the same order: three passes of 11, 11 and 10 bits count them by digit in shared memory and find
// the weight that the last selected token has, and how many of the tokens that have it are selected.
// A last pass writes slots in order. Counts are integers, so nothing depends on the order of threads.
//
// cub has no top-k by segment that takes the earlier of equals, and would not run under emulation.
//
// Weights are read four times, 16 bytes a thread, and the last three from L2 as a rule. A block a head
// is what bounds it: about 1.5 us a pass and 32768 tokens at 64 bytes a cycle, however large the
// device.
#pragma once

#include "kernels/select/plan.cuh"

namespace svdq::device {

inline constexpr int kTopThreads = 512;
inline constexpr int kTopWarps = kTopThreads / kWarpSize;
inline constexpr int kTopBins = 2048;
inline constexpr int kThreadBins = kTopBins / kTopThreads;
inline constexpr int kThreadTokens = 4;
static_assert(kThreadBins == 4, "read as one vector");

struct TopPlan {
  alignas(16) int bins[kTopBins];
  int warp_sums[2][kTopWarps];
  int digit, left;  // found by a pass
  int invalid;      // tokens of pages that cannot be read
};

// Sort key of the mass of a token: 0 for those that are not chosen by mass.
SVDQ_DEVICE uint32_t weight_key(float weight) {
  return weight < 0.0f ? 0u : float_as_int(weight) + 1;
}

// Sums of the threads before this one, and of all. `turn` counts the calls, whose sums alternate
// between two places. Contains a barrier.
SVDQ_DEVICE int sum_before(TopPlan& s, int own, int turn, int& all) {
  int sum = own;
  for (int delta = 1; delta < kWarpSize; delta *= 2) {
    const int other = shuffle(sum, lane_index() >= delta ? lane_index() - delta : lane_index());
    if (lane_index() >= delta) sum += other;
  }
  if (lane_index() == kWarpSize - 1) store(&s.warp_sums[turn % 2][warp_index()], sum);
  sync_threads();
  int before = sum - own;
  all = 0;
  for (int w = 0; w < kTopWarps; ++w) {
    const int part = load(&s.warp_sums[turn % 2][w]);
    if (w < warp_index()) before += part;
    all += part;
  }
  return before;
}

// Calls fn(slot, weight) for this thread's tokens of a run of kTopThreads * 4.
template <typename Fn>
SVDQ_DEVICE void for_own_tokens(const float* weights, int first, int length, const Fn& fn) {
  const int slot = first + thread_index() * kThreadTokens;
  if (slot >= length) return;
  const Floats4 four = load(reinterpret_cast<const Floats4*>(weights + slot));
  SVDQ_UNROLL
  for (int t = 0; t < kThreadTokens; ++t) {
    if (slot + t < length) fn(slot + t, four.x[t]);
  }
}

struct Threshold {
  uint32_t key;  // of the last token selected
  int ties;      // how many with this key are
};

// Finds the bound that selects the `budget` largest keys of at least 1, all if there are no more. Contains
// barriers; s.bins must not be in use.
SVDQ_DEVICE Threshold find_threshold(TopPlan& s, const float* weights, int length, int budget) {
  uint32_t prefix = 0;
  int left = budget;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    for (int i = thread_index(); i < kTopBins; i += kTopThreads) store(&s.bins[i], 0);
    if (thread_index() == 0) store(&s.digit, -1);
    sync_threads();
    for (int first = 0; first < length; first += kTopThreads * kThreadTokens) {
      for_own_tokens(weights, first, length, [&](int, float weight) {
        const uint32_t key = weight_key(weight);
        // Shifted in two steps, as 32 at once would be undefined.
        if (key != 0 && key >> shift >> (bits - 1) >> 1 == prefix)
          add_shared(&s.bins[key >> shift & ((1u << bits) - 1)], 1);
        if (pass == 0 && weight == kInvalid) add_shared(&s.invalid, 1);
      });
    }
    sync_threads();
    // Threads take bins from the top, so the digit is where the sum reaches what is left.
    const int top = kTopBins - (thread_index() + 1) * kThreadBins;
    const Words4 own = load(reinterpret_cast<const Words4*>(&s.bins[top]));
    int sum = 0, all = 0;
    SVDQ_UNROLL
    for (int i = 0; i < kThreadBins; ++i) sum += static_cast<int>(own.word[i]);
    int before = sum_before(s, sum, pass, all);
    if (before < left && before + sum >= left) {
      SVDQ_UNROLL
      for (int i = kThreadBins - 1; i >= 0; --i) {
        const int count = static_cast<int>(own.word[i]);
        if (before < left && before + count >= left) {
          store(&s.digit, top + i);
          store(&s.left, left - before);
        }
        before += count;
      }
    }
    sync_threads();
    const int digit = load(&s.digit);
    if (digit < 0) return {0, 0};  // fewer than the budget
    left = load(&s.left);
    prefix = prefix << bits | static_cast<uint32_t>(digit);
    sync_threads();
  }
  return {prefix, left};
}

// Place of `slot` in an ascending list that has it.
SVDQ_DEVICE int coord_of(const int32_t* slots, int count, int slot) {
  int first = 0;
  while (count > 0) {
    const int half = count / 2;
    if (load(&slots[first + half]) < slot) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// Grid: x = head, z = sequence.
SVDQ_KERNEL(kTopThreads)
select_top_kernel(SelectParams p, SelectWorkspace workspace) {
  TopPlan& s = shared_memory<TopPlan>();
  const SequencePages sequence = sequence_pages(p, block_z());
  const int64_t head = int64_t{block_z()} * p.keys.layout.num_heads + block_x();
  const int room = p.budget + p.keys.num_outliers, length = sequence.valid ? sequence.length : 0;
  float* weights = workspace.weights + head * workspace.max_pages * kPageTokens;
  const int32_t* outliers = p.keys.outlier_slots + head * p.keys.num_outliers;
  int32_t* slots = p.slots + head * room;
  const auto known = [&](int slot) { return slot >= 0 && slot < length; };

  if (thread_index() == 0) store(&s.invalid, 0);
  for (int i = thread_index(); i < p.keys.num_outliers; i += kTopThreads) {
    const int slot = load(&outliers[i]);
    if (known(slot) && load(&weights[slot]) != kInvalid) store(&weights[slot], kOutlier);
  }
  sync_threads();
  const Threshold threshold = find_threshold(s, weights, length, p.budget);
  sync_threads();
  const bool valid = sequence.valid && load(&s.invalid) == 0;

  int count = 0, ties = 0, turn = 0;  // selected so far; seen so far of the threshold's key
  for (int first = 0; first < length && valid; first += kTopThreads * kThreadTokens) {
    uint32_t above = 0, equal = 0;  // a bit for each of the thread's tokens
    for_own_tokens(weights, first, length, [&](int slot, float weight) {
      const uint32_t key = weight_key(weight), bit = 1u << slot % kThreadTokens;
      if (key > threshold.key || weight == kOutlier) {
        above |= bit;
      } else if (key == threshold.key && key != 0) {
        equal |= bit;
      }
    });
    // Two counts of at most 2048 in one.
    int all;
    const int sums = sum_before(s, count_bits(equal) << 16 | count_bits(above), turn++, all);
    int tie = ties + (sums >> 16);
    int place = count + (sums & 0xffff) + (tie < threshold.ties ? tie : threshold.ties) -
                (ties < threshold.ties ? ties : threshold.ties);
    for (int t = 0; t < kThreadTokens; ++t) {
      const bool tied = (equal >> t & 1) != 0;
      if ((above >> t & 1) != 0 || (tied && tie < threshold.ties))
        store(&slots[place++], first + thread_index() * kThreadTokens + t);
      tie += tied;
    }
    const int before = ties < threshold.ties ? ties : threshold.ties;
    ties += all >> 16;
    count += (all & 0xffff) + (ties < threshold.ties ? ties : threshold.ties) - before;
  }
  for (int i = count + thread_index(); i < room; i += kTopThreads)
    store(&slots[i], i == 0 && !valid ? kBadSlot : kNoSlot);
  sync_threads();

  for (int i = thread_index(); i < p.keys.num_outliers; i += kTopThreads) {
    const int slot = load(&outliers[i]);
    store(&p.outlier_indices[head * p.keys.num_outliers + i],
          valid && known(slot) ? coord_of(slots, count, slot) : kNoSlot);
  }
}

inline LaunchShape select_top_launch(const SelectParams& p) {
  return {p.keys.layout.num_heads, 1, p.keys.batch, kTopThreads, static_cast<int>(sizeof(TopPlan))};
}

}  // namespace svdq::device
