// The halves of a decode step around attend: new rows join the window at lengths that lie on the device; what is due
// is packed, and later rows move down. Blocks of sequences that are not due exit at once.
#pragma once

#include "kernels/pack/pack.cuh"
#include "kernels/pack/unpack.cuh"

namespace svdq::device {

inline constexpr int kStepThreads = 128;

SVDQ_DEVICE bool within(float x, float limit) { return x <= limit && x >= -limit; }

// Plans the step of sequence block_x(). One that has numbers out of range, or no room, gets a fault.
SVDQ_KERNEL(kStepThreads) plan_step_kernel(StepParams p) {
  const int b = block_x(), length = static_cast<int>(p.new_keys.num_tokens), dim = p.head_dim;
  constexpr float kLargest = 3.402823466e38f;
  for (int64_t i = thread_index(); i < int64_t{p.num_heads} * length * dim; i += kStepThreads) {
    const int64_t d = i % dim, token = i / dim % length, head = i / dim / length;
    const int64_t key = b * p.keys_batch_stride + head * p.new_keys.head_stride +
                        token * p.new_keys.token_stride + d;
    const int64_t value = b * p.values_batch_stride + head * p.new_values.head_stride +
                          token * p.new_values.token_stride + d;
    if (!within(load_number(p.new_keys.data, p.dtype, key), kLargest) ||
        !within(load_number(p.new_values.data, p.dtype, value), p.value_limit))
      store(&p.faults[b], 1);
  }
  sync_threads();
  if (thread_index() != 0) return;
  const int lens = load(&p.window_lens[b]), slots = load(&p.cache_seqlens[b]);
  const int after_sinks = slots > p.sink_tokens ? slots - p.sink_tokens : 0;
  const int first = p.first_position ? load(&p.first_position[b]) : 0;
  const int column = slots / kPageTokens, page_end = (column + 1) * kPageTokens;
  const bool due = lens + length + after_sinks - p.residual_length >= page_end;
  bool fits = lens >= 0 && slots >= 0 && lens + length <= p.rows;
  int page = 0;
  if (fits && due) {
    fits = column < p.table_stride;
    if (fits) page = load(&p.page_table[b * p.table_stride + column]);
    fits = fits && page >= 0 && page < p.num_pages;
  }
  if (!fits) store(&p.faults[b], 1);
  const bool goes_on = fits && load(&p.faults[b]) == 0;
  store(&p.plan.lens[b], goes_on ? lens + length : -1);
  store(&p.plan.position[b], first + after_sinks + lens);
  store(&p.plan.page_position[b], first + column * kPageTokens);
  store(&p.plan.slot[b], slots);
  store(&p.plan.count[b], goes_on && due ? page_end - slots : 0);
  store(&p.plan.page[b], page);
}

// Copies the new rows. Grid: x = token, y = head, z = sequence.
template <typename Number>
SVDQ_KERNEL(kStepThreads)
append_rows_kernel(StepParams p) {
  const int64_t b = block_z(), head = block_y(), token = block_x();
  const int lens = load(&p.plan.lens[b]);
  if (lens < 0) return;
  const int64_t row = (b * p.num_heads + head) * p.rows + lens - p.new_keys.num_tokens + token;
  const Number* keys = static_cast<const Number*>(p.new_keys.data) + b * p.keys_batch_stride +
                       head * p.new_keys.head_stride + token * p.new_keys.token_stride;
  const Number* values = static_cast<const Number*>(p.new_values.data) + b * p.values_batch_stride +
                         head * p.new_values.head_stride + token * p.new_values.token_stride;
  for (int d = thread_index(); d < p.head_dim; d += kStepThreads) {
    store(static_cast<Number*>(p.window_keys) + row * p.head_dim + d, load(&keys[d]));
    store(static_cast<Number*>(p.window_values) + row * p.head_dim + d, load(&values[d]));
  }
}

// The tokens of sequence block_z() that are due.
struct DueTokens {
  PageSpan span;
  int64_t row;  // of the window
};

SVDQ_DEVICE DueTokens due_tokens(const StepParams& p) {
  const int b = block_z(), slot = load(&p.plan.slot[b]);
  const PageSpan span{load(&p.plan.page[b]), 0, slot % kPageTokens, load(&p.plan.count[b])};
  return {span, slot < p.sink_tokens ? slot : p.sink_tokens};
}

// Rows of the window from `row` of sequence block_z() on.
SVDQ_DEVICE TokenSource window_rows(const StepParams& p, const void* rows, int64_t row) {
  const int64_t first = (int64_t{block_z()} * p.num_heads * p.rows + row) * p.head_dim;
  const int bytes = p.dtype == DataType::kFloat32 ? 4 : 2;
  return {static_cast<const uint8_t*>(rows) + first * bytes, p.dtype, int64_t{p.rows} * p.head_dim,
          p.head_dim, kPageTokens};
}

SVDQ_DEVICE KeyCodec codec_of(const StepPackParams& p, const KeyCodec& all) {
  const int64_t b = block_z(), dim = p.layout.head_dim, means = b * p.layout.num_heads * dim;
  return {all.rope, all.basis + b * p.rank * dim, all.scale + b * p.rank, all.mean + means,
          nullptr};
}

// Keys that are due, or with `rest` [B, H, 64, D] what the pre-RoPE channels left of them. Grid: y = head, z =
// sequence.
template <int kDim>
SVDQ_KERNEL(kPackThreads)
pack_due_keys_kernel(StepPackParams p, LayoutView layout, KeyCodec codec, TokenRows rows,
                     HeadTable heads, const float* rest) {
  const DueTokens due = due_tokens(p.step);
  if (due.span.count == 0) return;
  const int64_t head_numbers = int64_t{kPageTokens} * layout.head_dim;
  rows.source = rest ? TokenSource{rest + block_z() * layout.num_heads * head_numbers,
                                   DataType::kFloat32, head_numbers, layout.head_dim, kPageTokens}
                     : window_rows(p.step, p.step.window_keys, due.row);
  const PackKeysParams own{rows.source, layout, codec_of(p, codec), 0, p.k_pages, nullptr, 0};
  pack_page_keys<kDim>(own, rows, heads, due.span, block_z());
}

// rest [B, H, 64, D]: decoded pre-RoPE channels of the keys that are due.
template <int kDim>
SVDQ_KERNEL(kUnpackThreads)
unpack_due_keys_kernel(StepPackParams p, HeadTable heads, DecodeParams d) {
  const DueTokens due = due_tokens(p.step);
  if (due.span.count == 0) return;
  const KeyCodec codec = codec_of(p, p.codec);
  d.basis = codec.basis;
  d.scale = codec.scale;
  d.mean = codec.mean;
  d.keys += int64_t{block_z()} * p.layout.num_heads * kPageTokens * p.layout.head_dim;
  const UnpackParams own{p.layout, p.k_pages, nullptr, 0, kPageTokens};
  unpack_page_keys<kDim>(own, heads, due.span, block_z(), d);
}

// rest becomes the keys less what it was.
SVDQ_KERNEL(kStepThreads) residual_due_kernel(StepPackParams p, float* rest) {
  const DueTokens due = due_tokens(p.step);
  const int dim = p.layout.head_dim;
  const TokenSource keys = window_rows(p.step, p.step.window_keys, due.row);
  float* own = rest + (int64_t{block_z()} * p.layout.num_heads + block_y()) * kPageTokens * dim;
  for (int i = thread_index(); i < due.span.count * dim; i += kStepThreads) {
    const float key = load_number(keys.data, keys.dtype, block_y() * keys.head_stride + i);
    store(&own[i], key - load(&own[i]));
  }
}

template <int kDim>
SVDQ_KERNEL(kPackThreads)
pack_due_values_kernel(StepPackParams p, HeadTable heads) {
  const DueTokens due = due_tokens(p.step);
  if (due.span.count == 0) return;
  const TokenSource source = window_rows(p.step, p.step.window_values, due.row);
  const PackValuesParams own{source, p.layout, p.v_pages, nullptr, 0};
  pack_page_values<kDim>(own, true, heads, due.span);
}

template <typename Number>
SVDQ_KERNEL(kPackThreads)
copy_due_values_kernel(StepPackParams p) {
  const DueTokens due = due_tokens(p.step);
  if (due.span.count == 0) return;
  const TokenSource source = window_rows(p.step, p.step.window_values, due.row);
  copy_page_values<Number>({source, p.layout, p.v_pages, nullptr, 0}, due.span);
}

// Moves later rows down and sets the lengths. A thread moves a channel row by row, so source and target may overlap.
template <typename Number>
SVDQ_KERNEL(kStepThreads)
finish_step_kernel(StepParams p) {
  const int b = block_z(), lens = load(&p.plan.lens[b]);
  if (lens < 0) return;
  const DueTokens due = due_tokens(p);
  const int slots = load(&p.plan.slot[b]) + due.span.count;
  const int stop = static_cast<int>(due.row) + due.span.count;
  const int moved = due.span.count ? lens - stop : 0;
  const int64_t first = (int64_t{b} * p.num_heads + block_y()) * p.rows * p.head_dim;
  for (void* rows : {p.window_keys, p.window_values}) {
    Number* own = static_cast<Number*>(rows) + first;
    for (int d = thread_index(); d < p.head_dim; d += kStepThreads) {
      for (int i = 0; i < moved; ++i)
        store(&own[int64_t{p.sink_tokens + i} * p.head_dim + d],
              load(&own[int64_t{stop + i} * p.head_dim + d]));
    }
  }
  if (block_y() > 0 || thread_index() > 0) return;
  store(&p.window_lens[b], due.span.count ? p.sink_tokens + moved : lens);
  store(&p.cache_seqlens[b], slots);
}

}  // namespace svdq::device
