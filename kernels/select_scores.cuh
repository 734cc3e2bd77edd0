// Scores of packed tokens by their leading channels, and what becomes of them: each query row's
// log-sum-exp over a sample of pages, then a weight per token.
//
// A block takes 16 pages of a KV head. The lines of their leading channels arrive by cp.async, 16
// bytes a thread, whole lines and nothing else, while the weights of the channels are made: for all
// 16 pages by tensor cores (select_absorb.cuh), then rounded to 8 bits, with a step of its own for
// each page, row and band. Scores are integer dot products of four codes (dp4a); 16 threads share a
// page and a thread has 4 tokens for all rows. Only weights are written, 4 bytes a token.
//
// A page of 64 tokens with 8 channels of 4 bits, 4 query rows and head_dim 128 takes about 110
// instructions of a warp: 12 to put rotations in order, 11 for the product (2.5 of them mma), 20 to
// round it, 64 to score (16 dp4a). A multiprocessor issues them in 27 cycles. Its bytes are 256 of
// codes, 256 of weights and, of 8 KV heads, a 64-byte share of the rotations: 43 cycles of an A100's
// 2.0 TB/s, so memory is the limit.
#pragma once

#include "kernels/select_plan.cuh"
#include "kernels/softmax.cuh"

namespace svdq::device {

inline constexpr int kRunThreads = 8;                              // of a page's rows
inline constexpr int kPageThreads = 16;                            // of a page's tokens
inline constexpr int kRoundPages = kSelectThreads / kPageThreads;  // scored at once
inline constexpr int kRounds = kRunPages / kRoundPages;
inline constexpr int kMaxSelectBands = 2 * kNumWidths;
static_assert(kRunThreads * kRunPages == kSelectThreads && kRunThreads == kRowTile);

// Shared memory of a block, in this order.
struct SelectLayout {
  int turns;    // Words4 [turn_steps, 32]: A fragments, 16 pages x 8 pairs
  int codes;    // [16, code_bytes]
  int outputs;  // float [16, output_stride]
  int quads;    // uint32_t [16, channels / 4, rows] of signed bytes
  int steps;    // float [16, kMaxSelectBands, rows]
  int offsets;  // float [16, rows]
  int states;   // RowState [4, rows]
  int bytes;
  int output_stride;  // pages apart in the banks
};

SVDQ_HOST_DEVICE constexpr SelectLayout select_layout(const SelectWork& work) {
  SelectLayout at{};
  at.output_stride = work.output_tiles * 8 + 8;
  at.codes = work.turn_steps * kWarpSize * 16;
  at.outputs = at.codes + kRunPages * work.code_bytes;
  at.quads = at.outputs + kRunPages * at.output_stride * 4;
  at.steps = at.quads + kRunPages * kMaxSelectChannels / kQuad * work.tile_rows * 4;
  at.offsets = at.steps + kRunPages * kMaxSelectBands * work.tile_rows * 4;
  at.states = at.offsets + kRunPages * work.tile_rows * 4;
  at.bytes = at.states + kSelectWarps * work.tile_rows * 8;
  return at;
}

struct SelectMemory {
  alignas(16) uint8_t bytes[16];  // more follow
};

// Numbers of a row of tiles, as wide as they may be read at once.
template <int kCount>
SVDQ_DEVICE void load_words(const uint32_t* from, uint32_t (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
    SVDQ_UNROLL
    for (int i = 0; i < kCount / 4; ++i) {
      const Words4 words = load(reinterpret_cast<const Words4*>(from) + i);
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) to[i * 4 + e] = words.word[e];
    }
  } else {
    SVDQ_UNROLL
    for (int i = 0; i < kCount; ++i) to[i] = load(&from[i]);
  }
}

// Scores of a run of pages for a tile of kRows query rows at a time.
template <int kRows>
class SelectRun {
 public:
  // Page i of the run is page first + i * stride of the sequence, if that is below `end`.
  SVDQ_DEVICE SelectRun(const SelectParams& p, const SelectWork& work, const HeadTable& heads,
                        int head_index, int first, int stride, int end)
      : p_(p),
        work_(work),
        at_(select_layout(work)),
        shared_(shared_memory<SelectMemory>().bytes),
        head_(leading_channels(head_plan(heads, head_index), p.channels)),
        sequence_head_(int64_t{block_z()} * p.layout.num_heads + head_index),
        first_(first),
        stride_(stride),
        end_(end) {}

  SVDQ_DEVICE int page(int i) const { return first_ + i * stride_; }
  SVDQ_DEVICE bool has(int i) const { return page(i) < end_; }
  // Whether the pool has page i of the run.
  SVDQ_DEVICE bool known(int i) const {
    const int64_t id = page_id(i);
    return id >= 0 && id < p_.num_pages;
  }
  SVDQ_DEVICE int64_t sequence_head() const { return sequence_head_; }

  // Starts to copy codes, and puts the rotations of the pages in order.
  SVDQ_DEVICE void begin() {
    const int pieces = leading_bytes(head_) / 16;
    for (int i = thread_index(); i < kRunPages * pieces; i += kSelectThreads) {
      const int page = i / pieces, piece = i % pieces;
      if (!has(page) || !known(page)) continue;
      copy_async(shared_ + at_.codes + page * work_.code_bytes + piece * 16,
                 p_.k_pages + page_id(page) * p_.layout.k_page_bytes + head_.k_offset + piece * 16);
    }
    commit_copies();
    const int half = select_half(p_);
    const Floats2* turns = work_.page_rotation + int64_t{block_z()} * work_.max_pages * half;
    for (int i = thread_index(); i < work_.turn_steps * kWarpSize; i += kSelectThreads) {
      Words4 a{};
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {
        const Place at = FragmentA16::place(lane_index(), 2 * w);
        const int pair = i / kWarpSize * 8 + at.col / 2;
        if (pair >= half || !has(at.row)) continue;
        const Floats2 turn = load(&turns[int64_t{page(at.row)} * half + pair]);
        a.word[w] = pack_half2(turn.x, turn.y);
      }
      store(&array<Words4>(at_.turns)[i], a);
    }
    sync_threads();
  }

  // Weights of the channels for tile `tile`; norm(row) comes off the rows' scores. Contains
  // barriers.
  template <typename Norm>
  SVDQ_DEVICE void prepare(int tile, const Norm& norm) {
    const int64_t first = select_tile(work_, sequence_head_, tile) * work_.output_tiles;
    const int outputs = (head_.rank() + 1) * kRows;
    for (int t = warp_index(); t * 8 < outputs; t += kSelectWarps) {
      float sum[4] = {};
      const Words2* fragments = work_.fragments + (first + t) * work_.turn_steps * kWarpSize;
      for (int step = 0; step < work_.turn_steps; ++step) {
        const Words4 a = load(&array<Words4>(at_.turns)[step * kWarpSize + lane_index()]);
        const Words2 b = load(&fragments[step * kWarpSize + lane_index()]);
        MmaHalf::run(sum, a.word, b.word);
      }
      const int64_t column = (first + t) * 8 + lane_index() % 4 * 2;
      const Floats2 unit = load(reinterpret_cast<const Floats2*>(&work_.step[column]));
      const Floats2 constant = load(reinterpret_cast<const Floats2*>(&work_.constant[column]));
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float* to = array<float>(at_.outputs) + (lane_index() / 4 + half * 8) * at_.output_stride +
                    t * 8 + lane_index() % 4 * 2;
        store(reinterpret_cast<Floats2*>(to),
              Floats2{fused(sum[2 * half], unit.x, constant.x),
                      fused(sum[2 * half + 1], unit.y, constant.y)});
      }
    }
    sync_threads();
    round_weights(tile, norm);
    wait_copies<0>();
    sync_threads();
  }

  // Scores, in units of log2, of this thread's 4 tokens of page i: tokens first_token() and on.
  SVDQ_DEVICE void score(int i, float (&score)[4][kRows]) const {
    const float* offsets = array<float>(at_.offsets) + i * kRows;
    const float* steps = array<float>(at_.steps) + i * kMaxSelectBands * kRows;
    const uint32_t* weights = array<uint32_t>(at_.quads) + i * (kMaxSelectChannels / kQuad) * kRows;
    const uint8_t* codes = shared_ + at_.codes + i * work_.code_bytes;
    const int group = thread_index() % kPageThreads / 4, piece = thread_index() % 4;
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float offset = load(&offsets[r]);
      SVDQ_UNROLL
      for (int t = 0; t < 4; ++t) score[t][r] = offset;
    }
    const auto band = [&]<int kWidth>(int count) {
      constexpr int kUnits = 8 / kWidth;
      constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
      int sum[4][kRows] = {};
      for (int quad = 0; quad < count / kQuad; ++quad) {
        const int unit = quad * kGroups + group;
        const Words4 lanes =
            load(reinterpret_cast<const Words4*>(codes + unit / kUnits * kLineBytes + piece * 16));
        uint32_t weight[kRows];
        load_words(weights, weight);
        SVDQ_UNROLL
        for (int t = 0; t < 4; ++t) {
          const uint32_t four = lanes.word[t] >> (unit % kUnits * kWidth) & kMask;
          SVDQ_UNROLL
          for (int r = 0; r < kRows; ++r) sum[t][r] = dot4(four, weight[r], sum[t][r]);
        }
        weights += kRows;
      }
      SVDQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float step = load(&steps[r]);
        SVDQ_UNROLL
        for (int t = 0; t < 4; ++t)
          score[t][r] = fused(static_cast<float>(sum[t][r]), step, score[t][r]);
      }
      steps += kRows;
      codes += count * kWidth * kPageTokens / 8;
    };
    // A loop, since code for every width twice takes more registers.
    for (int part = 0; part < 2; ++part) {
      Bands bands;
      SVDQ_UNROLL
      for (int w = 0; w < kNumWidths; ++w)
        bands.count[w] = part == 0 ? head_.core.count[w] : head_.tail.count[w];
      for_each_band(bands, band);
    }
  }

  // Page of the run that this thread scores in a round, and its first token there.
  SVDQ_DEVICE static int round_page(int round) {
    return round * kRoundPages + thread_index() / kPageThreads;
  }
  SVDQ_DEVICE static int first_token() { return thread_index() % kPageThreads * 4; }

  SVDQ_DEVICE RowState* states() const { return array<RowState>(at_.states); }

 private:
  template <typename T>
  SVDQ_DEVICE T* array(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  SVDQ_DEVICE int64_t page_id(int i) const {
    return load(&p_.page_table[int64_t{block_z()} * p_.table_stride + page(i)]);
  }

  // A thread per page and row: signed bytes, and what middle codes contribute taken off the
  // constant with the rounded weights.
  template <typename Norm>
  SVDQ_DEVICE void round_weights(int tile, const Norm& norm) {
    const int page = thread_index() / kRunThreads, row = thread_index() % kRunThreads;
    if (row >= kRows) return;
    const float* outputs = array<float>(at_.outputs) + page * at_.output_stride + row;
    uint32_t* quads =
        array<uint32_t>(at_.quads) + page * (kMaxSelectChannels / kQuad) * kRows + row;
    float* steps = array<float>(at_.steps) + page * kMaxSelectBands * kRows + row;
    float offset = load(&outputs[head_.rank() * kRows]) - norm(tile, row);
    for (int part = 0; part < 2; ++part) {
      for (int w = 0; w < kNumWidths; ++w) {
        const int count = part == 0 ? head_.core.count[w] : head_.tail.count[w];
        if (count == 0) continue;
        float largest = 0.0f;
        for (int j = 0; j < count; ++j) {
          const float x = load(&outputs[j * kRows]);
          largest = x > largest ? x : -x > largest ? -x : largest;
        }
        const float step = largest * (1.0f / 127), inverse = step > 0.0f ? 127 / largest : 0.0f;
        int sum = 0;
        for (int quad = 0; quad < count / kQuad; ++quad) {
          uint32_t bytes = 0;
          SVDQ_UNROLL
          for (int e = 0; e < kQuad; ++e) {
            const int x = round_to_int(load(&outputs[(quad * kQuad + e) * kRows]) * inverse);
            sum += x;
            bytes |= (static_cast<uint32_t>(x) & 0xff) << (8 * e);
          }
          store(quads, bytes);
          quads += kRows;
        }
        const float middle = static_cast<float>((1 << band_width(w)) - 1) / 2;
        offset = fused(static_cast<float>(sum) * middle, -step, offset);
        store(steps, step);
        steps += kRows;
        outputs += count * kRows;
      }
    }
    store(&array<float>(at_.offsets)[page * kRows + row], offset);
  }

  const SelectParams& p_;
  const SelectWork& work_;
  SelectLayout at_;
  uint8_t* shared_;
  HeadPlan head_;
  int64_t sequence_head_;
  int first_, stride_, end_;
};

// Each row's maximum and sum over a run of the sampled pages. Grid: x = head, y = run, z = sequence.
template <int kRows>
SVDQ_KERNEL(kSelectThreads)
select_norms_kernel(SelectParams p, SelectWork work, HeadTable heads) {
  const SequencePages sequence = sequence_pages(p, block_z());
  const int stride = static_cast<int>(select_sample_stride(sequence.pages));
  SelectRun<kRows> run(p, work, heads, block_x(), stride / 2 + block_y() * kRunPages * stride,
                       stride, sequence.pages);
  run.begin();
  for (int tile = 0; tile < work.row_tiles; ++tile) {
    run.prepare(tile, [](int, int) { return 0.0f; });
    RowState state[kRows];
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) state[r] = empty_row();
    for (int round = 0; round < kRounds; ++round) {
      const int i = run.round_page(round);
      if (!run.has(i) || !run.known(i)) continue;
      float score[4][kRows];
      run.score(i, score);
      SVDQ_UNROLL
      for (int t = 0; t < 4; ++t) {
        const int slot = run.page(i) * kPageTokens + run.first_token() + t;
        if (slot < p.sink_tokens || slot >= sequence.length) continue;
        SVDQ_UNROLL
        for (int r = 0; r < kRows; ++r) {
          raise_max(state[r], score[t][r]);
          state[r].sum += exp2_fast(score[t][r] - state[r].max);
        }
      }
    }
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float most = warp_max(state[r].max);
      const float sum = warp_sum(state[r].sum * probability(state[r].max, most));
      if (lane_index() == 0) store(&run.states()[warp_index() * kRows + r], RowState{most, sum});
    }
    sync_threads();
    if (thread_index() < kRows) {
      RowState all = empty_row();
      for (int w = 0; w < kSelectWarps; ++w) {
        const RowState part = load(&run.states()[w * kRows + thread_index()]);
        raise_max(all, part.max);
        all.sum += part.sum * probability(part.max, all.max);
      }
      const int64_t at =
          (select_tile(work, run.sequence_head(), tile) * kSampleRuns + block_y()) * kRows +
          thread_index();
      store(&work.sample_max[at], all.max);
      store(&work.sample_sum[at], all.sum);
    }
    sync_threads();
  }
}

// log2 of a row's sum over the sample; 0 if the sample is empty, and what leaves nothing of a row
// that does not exist.
SVDQ_DEVICE float sample_norm(const SelectParams& p, const SelectWork& work, int64_t sequence_head,
                              int tile, int row) {
  if (int64_t{tile} * work.tile_rows + row >= query_rows(p)) return poisoned_score();
  RowState all = empty_row();
  const int64_t at = select_tile(work, sequence_head, tile) * kSampleRuns * work.tile_rows + row;
  for (int run = 0; run < kSampleRuns; ++run) {
    const float most = load(&work.sample_max[at + run * work.tile_rows]);
    raise_max(all, most);
    all.sum += load(&work.sample_sum[at + run * work.tile_rows]) * probability(most, all.max);
  }
  return all.sum > 0.0f ? all.max + log2_fast(all.sum) : 0.0f;
}

// Grid: x = head, y = run of 16 pages, z = sequence.
template <int kRows>
SVDQ_KERNEL(kSelectThreads)
select_scores_kernel(SelectParams p, SelectWork work, HeadTable heads) {
  const SequencePages sequence = sequence_pages(p, block_z());
  SelectRun<kRows> run(p, work, heads, block_x(), block_y() * kRunPages, 1, sequence.pages);
  if (!run.has(0)) return;
  run.begin();
  float weight[kRounds][4] = {};
  for (int tile = 0; tile < work.row_tiles; ++tile) {
    run.prepare(tile, [&](int tile, int row) {
      return sample_norm(p, work, run.sequence_head(), tile, row);
    });
    SVDQ_UNROLL
    for (int round = 0; round < kRounds; ++round) {
      const int i = run.round_page(round);
      if (!run.has(i) || !run.known(i)) continue;
      float score[4][kRows];
      run.score(i, score);
      SVDQ_UNROLL
      for (int t = 0; t < 4; ++t) {
        SVDQ_UNROLL
        for (int r = 0; r < kRows; ++r) weight[round][t] += exp2_fast(score[t][r]);
      }
    }
    sync_threads();
  }
  SVDQ_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const int i = run.round_page(round);
    if (!run.has(i)) continue;
    const int slot = run.page(i) * kPageTokens + run.first_token();
    Floats4 all;
    SVDQ_UNROLL
    for (int t = 0; t < 4; ++t) {
      const bool counts = slot + t >= p.sink_tokens && slot + t < sequence.length;
      all.x[t] = !counts ? kNotSelected : run.known(i) ? weight[round][t] : kUnreadable;
    }
    float* to = work.weights + run.sequence_head() * work.max_pages * kPageTokens + slot;
    store(reinterpret_cast<Floats4*>(to), all);
  }
}

inline LaunchShape select_norms_launch(const SelectParams& p, const SelectWork& work) {
  return {p.layout.num_heads, kSampleRuns, p.batch, kSelectThreads, select_layout(work).bytes};
}

inline LaunchShape select_scores_launch(const SelectParams& p, const SelectWork& work) {
  return {p.layout.num_heads, (work.max_pages + kRunPages - 1) / kRunPages, p.batch, kSelectThreads,
          select_layout(work).bytes};
}

}  // namespace svdq::device
