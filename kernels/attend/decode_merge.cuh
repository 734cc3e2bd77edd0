// Merges in attend_decode: the warps of a block become one partial result in shared memory, and the last block of a
// tile of query rows merges those of all blocks. Both add in a fixed order, so results do not depend on which block is
// last.
#pragma once

#include "kernels/attend/decode_values.cuh"
#include "kernels/attend/merge.cuh"

namespace svdq::device {

inline constexpr int kDecodeWarps = 4;  // of a block
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
static_assert(kDecodeThreads == kAttendThreads);  // for the window

// Channels of a row of floats in shared memory: rows apart by 4 banks, so that what a warp writes meets in none.
SVDQ_HOST_DEVICE constexpr int merge_stride(int head_dim) { return head_dim + 4; }
SVDQ_HOST_DEVICE constexpr int merge_rows_bytes(int head_dim) {
  return kRowTile * merge_stride(head_dim) * static_cast<int>(sizeof(float));
}

// Calls fn(row, channel) for groups of four channels of rows 0 .. rows - 1, a row a warp, so that what a warp reads or
// writes at once lies in one row.
template <typename Fn>
SVDQ_DEVICE void for_each_quad(int rows, int head_dim, const Fn& fn) {
  for (int d = lane_index() * 4; d < head_dim; d += kWarpSize * 4) {
    for (int row = warp_index(); row < rows; row += kDecodeWarps) fn(row, d);
  }
}

// What the warps of a block have of each row.
struct WarpStates {
  float max[kDecodeWarps][kRowTile];
  float sum[kDecodeWarps][kRowTile];
};

// Leaves the maxima and sums of a warp, whose lanes hold a sum in parts; one that could not read its pages poisons its
// block.
SVDQ_DEVICE void store_states(WarpStates& s, const RowState (&state)[2], bool valid) {
  SVDQ_UNROLL
  for (int j = 0; j < 2; ++j) {
    float sum = state[j].sum;
    for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
    if (lane_index() >= 4) continue;
    const int row = lane_index() * 2 + j;
    store(&s.max[warp_index()][row], valid ? state[j].max : poisoned_score());
    store(&s.sum[warp_index()][row], sum);
  }
}

// Maximum of a row over the first `warps` warps.
SVDQ_DEVICE float block_max(const WarpStates& s, int warps, int row) {
  float most = no_score();
  for (int w = 0; w < warps; ++w) {
    const float other = load(&s.max[w][row]);
    most = other > most ? other : most;
  }
  return most;
}

// Adds up `out` [warps][8][merge_stride], already relative to the block's maxima, as the block's partial result.
SVDQ_DEVICE void write_block(const WarpStates& s, const float* out, int64_t warp_stride, int warps,
                             const AttendWorkspace& workspace, const BlockRows& rows, int dim) {
  const int splits = workspace.splits();
  const int64_t first = rows.slot(workspace.row_tiles, 0) * splits + block_y();
  for_each_quad(kRowTile, dim, [&](int row, int d) {
    Floats4 sum = {};
    for (int w = 0; w < warps; ++w) {
      const float* from = out + w * warp_stride + row * merge_stride(dim) + d;
      const Floats4 part = load(reinterpret_cast<const Floats4*>(from));
      SVDQ_UNROLL
      for (int k = 0; k < 4; ++k) sum.x[k] += part.x[k];
    }
    float* to = workspace.partial_out + (first + int64_t{row} * splits) * dim + d;
    store(reinterpret_cast<Floats4*>(to), sum);
  });
  if (thread_index() >= kRowTile) return;
  const int row = thread_index();
  const float most = block_max(s, warps, row);
  float sum = 0.0f;
  for (int w = 0; w < warps; ++w)
    sum = fused(probability(load(&s.max[w][row]), most), load(&s.sum[w][row]), sum);
  store(&workspace.partial_max[first + int64_t{row} * splits], most);
  store(&workspace.partial_sum[first + int64_t{row} * splits], sum);
}

// Shared memory of the last block of a tile.
struct LastBlockPlan {
  int is_last;
  float max[kRowTile];
  float inverse[kRowTile];  // of the sum
  alignas(16) float pages
      [4];  // [8][merge_stride] more follow: sums over pages, whose values are rotated
};

SVDQ_HOST_DEVICE constexpr int last_block_bytes(int head_dim) {
  return static_cast<int>(sizeof(LastBlockPlan)) + merge_rows_bytes(head_dim);
}

// Four channels of a row, summed over splits first .. last - 1 relative to `most`.
SVDQ_DEVICE Floats4 sum_splits(const float* maxima, const float* out, int dim, int first, int last,
                               float most) {
  constexpr int kAtOnce = 4;  // loads in flight
  Floats4 sum = {};
  for (int i = first; i < last; i += kAtOnce) {
    float weight[kAtOnce];
    Floats4 part[kAtOnce];
    SVDQ_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const int split = i + k < last ? i + k : last - 1;
      weight[k] = i + k < last ? load(&maxima[split]) : no_score();
      part[k] = load(reinterpret_cast<const Floats4*>(out + int64_t{split} * dim));
    }
    SVDQ_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      const float p = probability(weight[k], most);
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) sum.x[e] = fused(p, part[k].x[e], sum.x[e]);
    }
  }
  return sum;
}

// Maximum and sum of a row over all splits and its learned sink, by a warp.
SVDQ_DEVICE RowState merge_states(const AttendParams& p, const AttendWorkspace& workspace,
                                  const BlockRows& rows, int row) {
  const int splits = workspace.splits();
  const int64_t at = rows.slot(workspace.row_tiles, row) * splits;
  const float sink = learned_sink(p, rows.head, rows.first + row);
  float most = sink;
  for (int i = lane_index(); i < splits; i += kWarpSize) {
    const float other = load(&workspace.partial_max[at + i]);
    most = other > most ? other : most;
  }
  most = warp_max(most);
  float sum = lane_index() == 0 ? probability(sink, most) : 0.0f;
  for (int i = lane_index(); i < splits; i += kWarpSize) {
    const float weight = probability(load(&workspace.partial_max[at + i]), most);
    sum = fused(weight, load(&workspace.partial_sum[at + i]), sum);
  }
  for (int mask = 1; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
  return {most, sum};
}

// Every block calls it when its partial result is written; the last of a tile's merges them all.
SVDQ_DEVICE void merge_if_last(const AttendParams& p, const AttendWorkspace& workspace,
                               const BlockRows& rows) {
  LastBlockPlan& s = shared_memory<LastBlockPlan>();
  const int splits = workspace.splits(), dim = p.keys.layout.head_dim;
  sync_threads();
  if (thread_index() == 0) {
    int* ticket = &workspace.tickets[rows.sequence_head * workspace.row_tiles + rows.tile];
    store(&s.is_last, take_ticket(ticket) == splits - 1);
  }
  sync_threads();
  if (!load(&s.is_last)) return;

  const int64_t first_row = rows.sequence_head * query_rows(p) + rows.first;
  for (int row = warp_index(); row < rows.count; row += kDecodeWarps) {
    const RowState state = merge_states(p, workspace, rows, row);
    if (lane_index() > 0) continue;
    store(&s.max[row], state.max);
    store(&s.inverse[row], state.sum > 0.0f ? 1.0f / state.sum : 0.0f);
    store(&p.lse[first_row + row], log_sum(state));
  }
  sync_threads();

  const auto sum_of = [&](int row, int d, int first, int last) {
    const int64_t at = rows.slot(workspace.row_tiles, row) * splits;
    return sum_splits(workspace.partial_max + at, workspace.partial_out + at * dim + d, dim, first,
                      last, load(&s.max[row]));
  };
  const auto pages = [&](int row, int d) {
    return reinterpret_cast<Floats4*>(&s.pages[row * merge_stride(dim) + d]);
  };
  for_each_quad(rows.count, dim, [&](int row, int d) {
    store(pages(row, d), sum_of(row, d, 0, workspace.page_splits));
  });
  sync_threads();
  // The rows of a warp's two teams are apart by 16 banks.
  static_assert(kDecodeThreads / kLanes == kRowTile);
  const int own = warp_index() + lane_index() / kLanes * kDecodeWarps;
  if (own < rows.count) TeamRotation(&s.pages[own * merge_stride(dim)], dim).unrotate();
  sync_threads();
  for_each_quad(rows.count, dim, [&](int row, int d) {
    const Floats4 packed = load(pages(row, d));
    const Floats4 exact = sum_of(row, d, workspace.page_splits, splits);
    const float inverse = load(&s.inverse[row]);
    SVDQ_UNROLL
    for (int k = 0; k < 4; ++k) {
      const float out = (packed.x[k] + exact.x[k]) * inverse;
      store_number(p.out, p.queries.dtype, (first_row + row) * dim + d + k, out);
    }
  });
}

}  // namespace svdq::device
