// The attend stage on a GPU: how a call is cut into blocks, its scratch memory, and its launches.
// Everything follows from shapes; no length is read on the host.
#pragma once

#include "csrc/gpu/rotations.h"
#include "kernels/attend_exact.cuh"
#include "kernels/merge.cuh"

namespace svdq::gpu {

// How a call is cut. The answer does not depend on it, but for rounding.
struct AttendCut {
  int split_pages;  // pages of a block, at least 1
  int split_exact;  // exact rows of a block, a multiple of 64
  int stages;       // pages in flight or in use, 2 to 4
};

// Bytes of a page that go through shared memory: the largest head's keys, and packed values.
inline int stage_bytes(const LayoutView& layout) {
  int keys = 0;
  for (int h = 0; h < layout.num_heads; ++h) keys = std::max(keys, layout.heads[h].page_bytes());
  return keys + (layout.value.packed() ? static_cast<int>(layout.value.page_bytes()) : 0);
}

template <typename Scores>
AttendCut plan_cut(const AttendParams& p, const Machine& machine) {
  constexpr int kBlocksPerSm = 4;   // enough to hide each other's barriers
  constexpr int kLeastPages = 4;    // fewer do not pay for a partial result
  constexpr int kLeastExact = 128;  // likewise
  const int64_t tiles = divide_up(device::query_rows(p), device::kRowTile);
  const int64_t blocks = tiles * p.layout.num_heads * p.batch;
  const int64_t wanted = divide_up(int64_t{kBlocksPerSm} * machine.num_sms, blocks);
  const auto share = [&](int64_t length, int64_t least) {
    return std::max(least, divide_up(length, wanted));
  };
  const int bytes = stage_bytes(p.layout), fixed = device::kPagesPlanBytes<Scores>;
  const int stages = std::min(4, (machine.max_shared_bytes - fixed) / bytes);
  SVDQ_CHECK(stages >= 2, "attend needs ", fixed + 2 * bytes,
             " bytes of shared memory a block for head_dim ", p.layout.head_dim, " and pages of ",
             bytes, " bytes a head; this device gives ", machine.max_shared_bytes);
  return {static_cast<int>(share(p.table_stride, kLeastPages)),
          static_cast<int>(divide_up(share(p.exact_rows, kLeastExact), kPageTokens) * kPageTokens),
          stages};
}

template <typename Queue>
device::AttendWork plan_work(const AttendParams& p, const AttendCut& cut, Queue& queue) {
  const LayoutView& layout = p.layout;
  device::AttendWork work{};
  work.row_tiles = static_cast<int>(divide_up(device::query_rows(p), device::kRowTile));
  work.max_pages = static_cast<int>(p.table_stride);
  work.split_pages = cut.split_pages;
  work.page_splits = static_cast<int>(divide_up(work.max_pages, cut.split_pages));
  work.split_exact = cut.split_exact;
  work.exact_splits = static_cast<int>(divide_up(p.exact_rows, cut.split_exact));
  work.stages = cut.stages;
  work.stage_bytes = stage_bytes(layout);

  const int64_t heads = int64_t{p.batch} * layout.num_heads;
  const int64_t tiles =
      heads * (layout.rope == RopeMode::kPre ? layout.head_dim / device::kRowTile : work.row_tiles);
  const int64_t slots = heads * work.row_tiles * device::kRowTile * work.splits();
  work.weights = queue.template allocate<device::Words2>(
      tiles * device::max_steps(layout.head_dim) * device::kWarpSize);
  work.step = queue.template allocate<float>(tiles * device::kRowTile);
  work.offset = queue.template allocate<float>(tiles * device::kRowTile);
  work.partial_out = queue.template allocate<float>(slots * layout.head_dim);
  work.partial_max = queue.template allocate<float>(slots);
  work.partial_sum = queue.template allocate<float>(slots);
  return work;
}

template <typename Scores, typename Queue>
void attend_pages(const AttendParams& p, const device::AttendWork& work,
                  const device::HeadTable& heads, Queue& queue) {
  const int bits = p.layout.value.bits;
  const auto kernel = bits == 4   ? device::attend_pages_kernel<Scores, 4>
                      : bits == 2 ? device::attend_pages_kernel<Scores, 2>
                                  : device::attend_pages_kernel<Scores, 0>;
  queue.launch("attend_pages", device::attend_pages_launch<Scores>(p, work), kernel, p, work,
               heads);
}

// `cut` null: planned.
template <int kDim, typename Queue>
void attend_class(const AttendParams& p, const AttendCut* cut, Queue& queue) {
  using Absorbed = device::AbsorbedScores<kDim>;
  using Reconstructed = device::ReconstructedScores<kDim>;
  const bool pre = p.layout.rope == RopeMode::kPre;
  const device::HeadTable heads = head_table(p.layout);
  device::AttendWork work = plan_work(p,
                                      cut   ? *cut
                                      : pre ? plan_cut<Reconstructed>(p, queue.machine())
                                            : plan_cut<Absorbed>(p, queue.machine()),
                                      queue);
  if (work.page_splits > 0 && pre) {
    const auto turns = rotations(p.rope, 0, p.first_position, p.batch, work.max_pages, queue);
    work.offset_rotation = turns.slots;
    work.page_rotation = turns.pages;
    queue.launch("columns", device::columns_launch<kDim>(p, work), device::columns_kernel<kDim>, p,
                 work, heads);
    attend_pages<Reconstructed>(p, work, heads, queue);
  } else if (work.page_splits > 0) {
    queue.launch("absorb", device::absorb_launch<kDim>(p, work), device::absorb_kernel<kDim>, p,
                 work, heads);
    attend_pages<Absorbed>(p, work, heads, queue);
  }
  if (work.exact_splits > 0) {
    queue.launch("attend_exact", device::attend_exact_launch<kDim>(p, work),
                 device::attend_exact_kernel<kDim>, p, work);
  }
  queue.launch("merge_splits", device::merge_splits_launch(p, work), device::merge_splits_kernel, p,
               work);
}

template <typename Queue>
void attend(const AttendParams& p, Queue& queue) {
  with_dim_class(p.layout.head_dim, [&]<int kDim>() { attend_class<kDim>(p, nullptr, queue); });
}

template <typename Queue>
void merge(const MergeParams& p, Queue& queue) {
  if (p.rows == 0) return;
  queue.launch("merge", device::merge_launch(p), device::merge_kernel, p);
}

}  // namespace svdq::gpu
