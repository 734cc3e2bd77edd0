// The first kernel of a decode step, whose lengths lie on the device. One block a head and sequence packs what is due,
// moves later rows of the window down and appends the new rows; beside it, blocks prepare what attend needs
// (kernels/attend/prepare.cuh). Attend sees the lengths of the plan that is made here, and stores them.
#pragma once

#include "kernels/attend/prepare.cuh"
#include "kernels/pack/pack.cuh"
#include "kernels/pack/unpack.cuh"
#include "kernels/step_params.h"

namespace svdq::device {

static_assert(kPackThreads == kAttendThreads && kUnpackThreads == kAttendThreads);
inline constexpr int kStepThreads = kAttendThreads;

// Scratch of the blocks that pack.
struct StepWorkspace {
  Floats2* rotation;  // [B, H, 64 + 1, pairs] by slot of a page, then to the page's first position
  float* rest;        // [B, H, 64, D] what pre-RoPE channels leave of hybrid keys
};

// What a block knows of its sequence.
struct SequenceStep {
  int lens, slots;  // before the step
  DueTokens due;
  int page;   // to fill, if tokens are due
  bool fits;  // window, page table and pools have room

  SVDQ_DEVICE int kept() const { return lens - due.count; }
};

SVDQ_DEVICE SequenceStep sequence_step(const StepParams& p, const AttendParams& a, int b) {
  SequenceStep step{load(&p.window_lens[b]), load(&p.cache_seqlens[b]), {0, 0}, 0, false};
  const int length = static_cast<int>(p.new_keys.num_tokens), column = step.slots / kPageTokens;
  step.fits = step.lens >= 0 && step.slots >= 0;
  if (!step.fits) return step;
  step.due = due_tokens(step.slots, step.lens, a.keys.sink_tokens, p.residual_length);
  step.fits = step.kept() + length <= a.window.rows;
  if (step.due.count > 0) {
    step.fits = step.fits && column < a.keys.table_stride;
    if (step.fits) step.page = load(&a.keys.page_table[b * a.keys.table_stride + column]);
    step.fits = step.fits && step.page >= 0 && step.page < a.keys.num_pages;
  }
  if (!step.fits) step.due.count = 0;
  return step;
}

SVDQ_DEVICE void store_plan(const StepParams& p, const AttendParams& a, const SequenceStep& step,
                            int b) {
  const int slots = step.slots + step.due.count, sinks = a.keys.sink_tokens;
  const int first = a.keys.first_position ? load(&a.keys.first_position[b]) : 0;
  const int length = static_cast<int>(p.new_keys.num_tokens);
  store(&p.plan.lens[b], step.fits ? step.kept() + length : -1);
  store(&p.plan.position[b], first + (slots > sinks ? slots - sinks : 0) + step.kept());
  store(&p.plan.slots[b], slots);
  store(&p.plan.kept[b], step.kept());
  if (!step.fits) store(&p.faults[b], 1);
}

// Number `channel` of a new key as it is stored, where it lies at `at`.
SVDQ_DEVICE float stored_key(const StepParams& p, const AttendParams& a, int64_t at, int64_t head,
                             int64_t channel) {
  const DataType dtype = p.new_keys.dtype;
  const float key = load_number(p.new_keys.data, dtype, at);
  if (!a.step.gain) return key;
  const int64_t gain = head * a.keys.layout.head_dim + channel;
  const float factor = rounded_to(dtype, load_number(a.step.gain, a.step.gain_dtype, gain));
  return rounded_to(dtype, key * factor);
}

// Number `i` of new rows [L, D] of a head.
SVDQ_DEVICE int64_t new_number(const TokenSource& rows, int64_t batch_stride, int b, int head,
                               int64_t i, int dim) {
  return b * batch_stride + head * rows.head_stride + i / dim * rows.token_stride + i % dim;
}

// Appends the new rows of a head behind `kept` rows of its window; if a number is out of range, its sequence gets a
// fault, and no row is written.
SVDQ_DEVICE void append_rows(const StepParams& p, const AttendParams& a, int b, int head, int kept,
                             int* shared_fault) {
  constexpr float kLargest = 3.402823466e38f;
  const int dim = a.keys.layout.head_dim;
  const int64_t count = p.new_keys.num_tokens * dim;
  const int64_t sequence_head = int64_t{b} * a.keys.layout.num_heads + head;
  const auto within = [](float x, float limit) { return x <= limit && x >= -limit; };
  if (thread_index() == 0) store(shared_fault, 0);
  sync_threads();
  for (int64_t i = thread_index(); i < count; i += kStepThreads) {
    const float key = stored_key(p, a, new_number(p.new_keys, p.keys_batch_stride, b, head, i, dim),
                                 sequence_head, i % dim);
    const float value =
        load_number(p.new_values.data, p.new_values.dtype,
                    new_number(p.new_values, p.values_batch_stride, b, head, i, dim));
    if (!within(key, kLargest) || !within(value, p.value_limit)) add_shared(shared_fault, 1);
  }
  sync_threads();
  if (load(shared_fault) != 0) {
    if (thread_index() == 0) store(&p.faults[b], 1);
    return;
  }
  const int64_t first = (sequence_head * a.window.rows + kept) * dim;
  for (int64_t i = thread_index(); i < count; i += kStepThreads) {
    const int64_t key = new_number(p.new_keys, p.keys_batch_stride, b, head, i, dim);
    const int64_t value = new_number(p.new_values, p.values_batch_stride, b, head, i, dim);
    store_number(p.window_keys, p.new_keys.dtype, first + i,
                 stored_key(p, a, key, sequence_head, i % dim));
    store_number(p.window_values, p.new_values.dtype, first + i,
                 load_number(p.new_values.data, p.new_values.dtype, value));
  }
}

// Moves rows stop .. lens - 1 of a head's window down to `to`. As many rows as lie between do not overlap, and move at
// once.
SVDQ_DEVICE void move_rows(void* rows, int64_t first_row, int row_bytes, int to, int stop,
                           int lens) {
  uint8_t* own = static_cast<uint8_t*>(rows) + first_row * row_bytes;
  const int gap = stop - to, pieces = row_bytes / 16;
  for (int from = stop; from < lens; from += gap) {
    const int count = lens - from < gap ? lens - from : gap;
    for (int i = thread_index(); i < count * pieces; i += kStepThreads) {
      const int64_t at = int64_t{from} * row_bytes + int64_t{i} * 16;
      store(reinterpret_cast<Words4*>(own + at - int64_t{gap} * row_bytes),
            load(reinterpret_cast<const Words4*>(own + at)));
    }
    sync_threads();
  }
}

// Rotations of the slots of a page and to its first position, for one block.
SVDQ_DEVICE void own_rotations(const Rope& rope, int64_t page_position, Floats2* to) {
  for (int i = thread_index(); i < (kPageTokens + 1) * rope.rotary_pairs; i += kStepThreads) {
    const int slot = i / rope.rotary_pairs;
    store(&to[i], rotation(slot < kPageTokens ? slot : page_position,
                           load(&rope.inv_freq[i % rope.rotary_pairs])));
  }
  sync_threads();
}

// Packs the due keys of head block_y() of sequence block_z().
template <int kDim>
SVDQ_DEVICE void pack_due_keys(const StepParams& p, const AttendParams& a,
                               const StepWorkspace& workspace, const HeadPlan& head,
                               const PageSpan& span, const TokenSource& source) {
  const PackedKeys& keys = a.keys;
  const LayoutView& layout = keys.layout;
  const int b = block_z(), dim = layout.head_dim, pairs = keys.codec.rope.rotary_pairs;
  const int64_t head_index = int64_t{b} * layout.num_heads + block_y();
  const int64_t channels = int64_t{b} * layout.rank, means = int64_t{b} * layout.num_heads * dim;
  KeyCodec codec = keys.codec;
  codec.basis += channels * dim;
  codec.scale += channels;
  codec.mean += means;
  Floats2* slots = workspace.rotation + head_index * (kPageTokens + 1) * pairs;
  Floats2* pages = slots + kPageTokens * pairs;
  if (pairs > 0) {
    const int first = keys.first_position ? load(&keys.first_position[b]) : 0;
    const int before = load(&p.cache_seqlens[b]) / kPageTokens * kPageTokens;
    own_rotations(codec.rope, int64_t{first} + before, slots);
  }
  const TokenRows rows{source, pairs, slots, pages, true};
  if (layout.rope != RopeMode::kHybrid) {
    pack_page_keys<kDim>({source, layout, codec, 0, p.k_pages, nullptr, 0}, rows, head, span, 0);
    return;
  }
  // Pre-RoPE channels first, then post-RoPE channels of what those leave.
  HeadPlan pre = head, post = head;
  pre.post = post.pre = Bands{};
  post.first_channel = head.first_post_channel();
  post.k_offset = head.post_offset();
  pack_page_keys<kDim>({source, layout, codec, 0, p.k_pages, nullptr, 0}, rows, pre, span, 0);
  sync_threads();
  const int64_t numbers = int64_t{kPageTokens} * dim;
  float* rest = workspace.rest + int64_t{b} * layout.num_heads * numbers;
  unpack_page_keys<kDim>({layout, p.k_pages, nullptr, 0, kPageTokens}, pre, span, 0,
                         {codec.rope, slots, pages, codec.basis, codec.scale, codec.mean, rest});
  sync_threads();
  float* own = rest + block_y() * numbers;
  for (int i = thread_index(); i < span.count * dim; i += kStepThreads) {
    const float key = load_number(source.data, source.dtype, block_y() * source.head_stride + i);
    store(&own[i], key - load(&own[i]));
  }
  sync_threads();
  codec.rope.rotary_pairs = 0;
  codec.mean = keys.codec.post_mean + means;
  const TokenSource left{rest, DataType::kFloat32, numbers, dim, kPageTokens};
  pack_page_keys<kDim>({left, layout, codec, 0, p.k_pages, nullptr, 0},
                       {left, 0, nullptr, nullptr, true}, post, span, 0);
}

template <int kDim>
SVDQ_DEVICE void pack_due_values(const StepParams& p, const AttendParams& a, const HeadPlan& head,
                                 const PageSpan& span, const TokenSource& source) {
  const PackValuesParams own{source, a.keys.layout, p.v_pages, nullptr, 0};
  if (a.keys.layout.packs_values()) {
    pack_page_values<kDim>(own, true, head, span);
  } else if (source.dtype == DataType::kFloat32) {
    copy_page_values<uint32_t>(own, span);
  } else {
    copy_page_values<uint16_t>(own, span);
  }
}

// The step of head block_y() of sequence block_z(). Tokens that are due are packed whatever the new ones are, so that
// all heads do the same.
template <int kDim>
SVDQ_DEVICE void step_rows(const StepParams& p, const AttendParams& a,
                           const StepWorkspace& workspace, const HeadTable& heads) {
  const int b = block_z(), head_index = block_y(), dim = a.keys.layout.head_dim;
  const SequenceStep step = sequence_step(p, a, b);
  if (head_index == 0 && thread_index() == 0) store_plan(p, a, step, b);
  if (!step.fits) return;
  if (step.due.count > 0) {
    const HeadPlan head = head_plan(heads, head_index);
    const PageSpan span{step.page, 0, step.slots % kPageTokens, step.due.count};
    const int number_bytes = p.new_keys.dtype == DataType::kFloat32 ? 4 : 2;
    const int64_t sequence_row = int64_t{b} * a.keys.layout.num_heads * a.window.rows;
    const auto due = [&](const void* rows) {
      return TokenSource{
          static_cast<const uint8_t*>(rows) + (sequence_row + step.due.first) * dim * number_bytes,
          p.new_keys.dtype, int64_t{a.window.rows} * dim, dim, kPageTokens};
    };
    pack_due_keys<kDim>(p, a, workspace, head, span, due(p.window_keys));
    sync_threads();
    pack_due_values<kDim>(p, a, head, span, due(p.window_values));
    sync_threads();
    const int64_t row = sequence_row + int64_t{head_index} * a.window.rows;
    for (void* rows : {p.window_keys, p.window_values}) {
      move_rows(rows, row, dim * number_bytes, step.due.first, step.due.first + step.due.count,
                step.lens);
    }
  }
  append_rows(p, a, b, head_index, step.kept(), &shared_memory<int>());
}

// `a` has the lengths of the cache before the step. Grid: x = the step, then the blocks of `blocks`, y = head, z =
// sequence.
template <int kDim>
SVDQ_KERNEL(kStepThreads)
begin_step_kernel(StepParams p, AttendParams a, AttendWorkspace workspace, StepWorkspace scratch,
                  HeadTable heads, PrepareBlocks blocks) {
  if (block_x() == 0) {
    step_rows<kDim>(p, a, scratch, heads);
  } else {
    prepare_block<kDim>(a, workspace, heads, blocks, block_x() - 1);
  }
}

template <int kDim>
LaunchShape begin_step_launch(const AttendParams& a, const PrepareBlocks& blocks) {
  constexpr size_t kPack = sizeof(PackPlan<kDim>), kFold = sizeof(FoldPlan<kDim>);
  constexpr size_t kUnpack = sizeof(UnpackPlan<kDim>);
  const size_t packs = a.keys.layout.rope == RopeMode::kHybrid && kUnpack > kPack ? kUnpack : kPack;
  return {1 + blocks.count(), a.keys.layout.num_heads, a.keys.batch, kStepThreads,
          static_cast<int>(packs > kFold ? packs : kFold)};
}

}  // namespace svdq::device
