// What a call of attend needs once for all its splits, in one launch: queries folded into post-RoPE channels, factors of
// the columns of pre-RoPE channels and their rotations (fold_query.cuh), and tickets at zero.
#pragma once

#include "kernels/attend/fold_query.cuh"
#include "kernels/machine/rope.cuh"

namespace svdq::device {

// Blocks of a head and sequence: one a tile of queries, one a tile of columns, and some that share the rotations.
struct PrepareBlocks {
  int queries, columns, rotations;

  SVDQ_HOST_DEVICE constexpr int count() const { return queries + columns + rotations; }
};

// Rotations by slot of a page and to the pages' first positions; `part` of `parts` blocks of a sequence. Pages that
// the step may begin are among them.
SVDQ_DEVICE void prepare_rotations(const AttendParams& p, const AttendWorkspace& workspace,
                                   int sequence, int part, int parts) {
  const int pairs = p.keys.codec.rope.rotary_pairs;
  const float* inv_freq = p.keys.codec.rope.inv_freq;
  if (workspace.pair_frequencies) {
    if (sequence > 0) return;
    for (int i = part * kAttendThreads + thread_index(); i < pairs; i += parts * kAttendThreads)
      store(&workspace.pair_frequencies[i], pair_frequency(load(&inv_freq[i])));
    return;
  }
  const int length = load(&p.keys.cache_seqlens[sequence]);
  int pages = length < 0 ? 0 : length / kPageTokens + 1;
  if (pages > workspace.max_pages) pages = workspace.max_pages;
  const int slots = sequence == 0 ? kPageTokens : 0;  // they are alike for all sequences
  const int first = p.keys.first_position ? load(&p.keys.first_position[sequence]) : 0;
  Floats2* page_rotation =
      workspace.page_rotation + int64_t{sequence} * workspace.max_pages * pairs;
  for (int i = part * kAttendThreads + thread_index(); i < (slots + pages) * pairs;
       i += parts * kAttendThreads) {
    const int place = i / pairs, pair = i % pairs, page = place - slots;
    const bool slot = page < 0;
    const int64_t position = slot ? place : first + int64_t{page} * kPageTokens;
    store(slot ? &workspace.offset_rotation[i] : &page_rotation[int64_t{page} * pairs + pair],
          rotation(position, load(&inv_freq[pair])));
  }
}

// Block `x` of a head and sequence.
template <int kDim>
SVDQ_DEVICE void prepare_block(const AttendParams& p, const AttendWorkspace& workspace,
                               const HeadTable& heads, const PrepareBlocks& blocks, int x) {
  const int head = block_y(), sequence = block_z();
  const int64_t sequence_head = int64_t{sequence} * p.keys.layout.num_heads + head;
  if (x == 0) {
    for (int i = thread_index(); i < workspace.row_tiles; i += kAttendThreads)
      store(&workspace.tickets[sequence_head * workspace.row_tiles + i], 0);
  }
  if (x < blocks.queries) {
    fold_queries<kDim>(p, workspace, heads, tile_rows(p, sequence, head, x, 1));
  } else if (x < blocks.queries + blocks.columns) {
    column_factors<kDim>(p, workspace, heads, sequence, head, x - blocks.queries);
  } else if (x < blocks.count()) {
    const int own = x - blocks.queries - blocks.columns;
    prepare_rotations(p, workspace, sequence, head * blocks.rotations + own,
                      p.keys.layout.num_heads * blocks.rotations);
  }
}

// Grid: x = the blocks of `blocks`, y = head, z = sequence.
template <int kDim>
SVDQ_KERNEL(kAttendThreads)
prepare_kernel(AttendParams p, AttendWorkspace workspace, HeadTable heads, PrepareBlocks blocks) {
  prepare_block<kDim>(p, workspace, heads, blocks, block_x());
}

template <int kDim>
LaunchShape prepare_launch(const AttendParams& p, const PrepareBlocks& blocks) {
  return {blocks.count(), p.keys.layout.num_heads, p.keys.batch, kAttendThreads,
          static_cast<int>(sizeof(FoldPlan<kDim>))};
}

}  // namespace svdq::device
