// Attends 64 tokens of the window with a task's rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/softmax-inl.h"
#include "csrc/cpu/attend/task-inl.h"
#include "csrc/cpu/attend/uncompressed-inl.h"
#include "csrc/cpu/pages/page_span-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Attends tokens block * 64 and on of the window.
inline void attend_window(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                          const RowBlock& head_rows, int64_t block) {
  const AttendParams& p = plan.p;
  const int dim = p.keys.layout.head_dim;
  const int64_t begin = block * kPageTokens;
  const int count =
      static_cast<int>(std::min<int64_t>(kPageTokens, plan.window_len(task.b) - begin));
  const int64_t at = task.b * p.window.batch_stride + task.h * p.window.head_stride + begin * dim;
  for (int64_t first = 0; first < task.rows; first += kTileRows) {
    with_count<kTileRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      // Mask tokens after each row's query.
      uint64_t masks[kRows], any = 0;
      for (int r = 0; r < kRows; ++r) {
        int64_t visible = count;
        if (p.causal) {
          const int64_t i = (task.row + first + r) % p.queries.length;
          visible = std::clamp<int64_t>(
              plan.window_len(task.b) - (p.queries.length - 1 - i) - begin, 0, count);
        }
        masks[r] = slot_mask(0, visible);
        any |= masks[r];
      }
      if (any == 0) return;

      // Score, update the softmax, accumulate values.
      const RowBlock rows = sub_block(head_rows, first, dim);
      const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
      uncompressed_scores<kRows>(query, dim, p.window.keys, p.window.dtype, at, count, s.scores);
      if (!softmax_rows<kRows>(rows, s.scores, masks, dim, s.probabilities)) return;
      accumulate_uncompressed<kRows>(s.probabilities, p.window.values, p.window.dtype, at, any, dim,
                                     rows.out);
    });
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
