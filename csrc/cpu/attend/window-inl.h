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

// Rows first .. last - 1 of the window that a query sees.
struct WindowRows {
  int64_t first, last;
};

// Those of query i of the task's sequence. Its own token is in the window if `causal`, and is the next one otherwise.
inline WindowRows visible_rows(const AttendPlan& plan, const AttendTask& task, int64_t i) {
  const AttendParams& p = plan.p;
  const int64_t length = plan.window_len(task.b);
  const int64_t own = p.causal ? length - p.queries.length + i : length + i;
  WindowRows rows{0, p.causal ? own + 1 : length};
  if (plan.slides()) {
    const int64_t sinks = std::min<int64_t>(p.window.sink_rows, plan.first_slot(task.b, i));
    rows.first = std::max(own - p.rules.window_size + 1, sinks);
  }
  return rows;
}

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
      // Mask tokens that a row's query does not see.
      uint64_t masks[kRows], any = 0;
      for (int r = 0; r < kRows; ++r) {
        const int64_t i = (task.row + first + r) % p.queries.length;
        const WindowRows seen = visible_rows(plan, task, i);
        masks[r] = slot_mask(std::clamp<int64_t>(seen.first - begin, 0, count),
                             std::clamp<int64_t>(seen.last - begin, 0, count));
        any |= masks[r];
      }
      if (any == 0) return;

      // Score, update the softmax, accumulate values.
      const RowBlock rows = sub_block(head_rows, first, dim);
      const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
      uncompressed_scores<kRows>(query, dim, p.window.keys, p.window.dtype, at, count, s.scores);
      if (p.rules.softcap > 0) cap_scores<kRows>(p.rules.softcap, s.scores);
      if (!softmax_rows<kRows>(rows, s.scores, masks, dim, s.probabilities)) return;
      accumulate_uncompressed<kRows>(s.probabilities, p.window.values, p.window.dtype, at, any, dim,
                                     rows.out);
    });
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
