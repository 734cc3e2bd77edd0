// The parameters of a decode step, and what of a window it packs: beside those of the stages (params.h).
#pragma once

#include "kernels/params.h"

namespace svdq {

// What a decode step packs of a sequence before it appends: `count` rows of the window from `first` on, which become
// packed slots up to a page's end. 0: nothing.
struct DueTokens {
  int first;
  int count;
};

// A page is filled once so many tokens stand before the last `residual_length` of the window. So a step attends to its
// own tokens, and to those that the step before left in the window, exactly.
SVDQ_HOST_DEVICE constexpr DueTokens due_tokens(int slots, int window_len, int sink_tokens,
                                                int residual_length) {
  const int after_sinks = slots > sink_tokens ? slots - sink_tokens : 0;
  const int page_end = (slots / kPageTokens + 1) * kPageTokens;
  const bool due = int64_t{window_len} + after_sinks - residual_length >= page_end;
  return {slots < sink_tokens ? slots : sink_tokens, due ? page_end - slots : 0};
}

// What a decode step makes of each of B sequences; columns of 32-bit integers on the device, that the first kernel of
// the step writes and the others read.
struct StepPlan {
  int32_t* lens;      // [B] window rows with the new ones; -1: the sequence stays as it is
  int32_t* position;  // [B] of the first query
  int32_t* slots;     // [B] packed slots
  int32_t* kept;      // [B] window rows without the new ones
};
inline constexpr int kStepPlanColumns = 4;

// A decode step of B sequences, whose lengths lie on the device. Its first kernel packs what is due, moves later rows of
// the window down and appends the new ones; then attend sees the lengths of the plan.
struct StepParams {
  TokenSource new_keys;       // of sequence 0, [H, L, D], without their gain
  TokenSource new_values;     // likewise
  int64_t keys_batch_stride;  // elements
  int64_t values_batch_stride;
  void* window_keys;       // [B, H, rows, D] contiguous
  void* window_values;     // likewise
  int32_t* window_lens;    // [B]
  int32_t* cache_seqlens;  // [B]
  uint8_t* k_pages;
  uint8_t* v_pages;
  int residual_length;
  float value_limit;  // largest magnitude of a value
  int32_t* faults;    // [B], set for sequences that cannot go on
  StepPlan plan;
};

// The decode step as a stage: `attend` has the plan's lengths, slots and positions.
struct DecodeStepParams {
  StepParams step;
  AttendParams attend;
};

}  // namespace svdq
