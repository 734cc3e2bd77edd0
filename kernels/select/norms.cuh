// Scores of packed tokens by their leading channels.
//
// A block takes 16 pages of a KV head. The lines of their leading channels arrive by cp.async, 16
// bytes a thread, whole lines and nothing else, while the weights of the channels are made: for all
// 16 pages by tensor cores (select_absorb.cuh), then rounded to 8 bits, with a step of its own for
// each page, row and band. Scores are integer dot products of four codes (dp4a); 8 threads share a
// page and a thread has 8 tokens for all rows. Only weights are written, 4 bytes a token.
//
// A page of 64 tokens with 8 channels of 4 bits, 4 query rows and head_dim 128 costs, with 8 KV heads,
// 576 bytes: 256 of codes, 256 of weights and its share of the rotations. That is 43 cycles of a
// multiprocessor's part of an A100's 2.0 TB/s. Its instructions of a warp, counted in the PTX, are
// 280: 110 score (16 of them dp4a), 55 make the weights (2.5 mma), 20 round them, 40 put rotations
// in order, 55 begin and end a block; 70 cycles of issue at four a cycle. The units themselves ask for
// less than the memory: 8 cycles of integers for dp4a, 16 for 2^x.
#pragma once

#include "kernels/select/plan.cuh"
#include "kernels/machine/softmax.cuh"

namespace svdq::device {

inline constexpr int kPageThreads = 8;  // of a page's tokens
inline constexpr int kTokenChunks = 2;  // of 4 tokens of a thread: in groups g and g + 2
inline constexpr int kSelectQuads = kMaxSelectChannels / kQuad;
static_assert(kRowTile * kChunkPages <= kSelectThreads &&
              kPageThreads * kChunkPages == kSelectThreads);
static_assert(kPageThreads * kTokenChunks * 4 == kPageTokens);

// Runs that are scored together: they share the weights that they meet, but registers are short.
template <int kRows>
inline constexpr int kChunksAtOnce = kRows < 8 ? kTokenChunks : 1;

// A sum of codes times signed bytes, less than 2^22, added to this integer is, as bits of a float,
// the sum added to 1.5 * 2^23: so it becomes a float by a subtraction, not by a slow conversion.
inline constexpr int kFloatBase = 0x4b400000;
SVDQ_DEVICE float sum_as_float(int sum) {
  return int_as_float(static_cast<uint32_t>(sum)) - 12582912.0f;
}
static_assert(kMaxSelectChannels * 255 * 127 < 1 << 22);

// Address of the 4 channels of a proxy quad among the proxy lines of a page.
struct SelectQuad {
  int line;        // byte of the line of its first unit
  int16_t unit;    // of that line
  int8_t width;    // index of kWidths
  int8_t is_last;  // of its band
};

// Shared memory of a block, in this order.
struct SelectLayout {
  int rotates;  // Words4 [rotation_steps, 32]: A fragments, 16 pages x 8 pairs
  int codes;    // [16, code_bytes]
  int outputs;  // float [16, output_stride]
  int weights;  // uint32_t [16, kSelectQuads, rows] of signed bytes
  int steps;    // float [16, kSelectQuads, rows], at the last quad of a band
  int offsets;  // float [16, rows]
  int states;   // RowState [4, rows]
  int quads;    // SelectQuad [kSelectQuads]
  int norms;    // float [rows]
  int pages;    // int32_t [16]: where in the pool, -1 for none
  int bytes;
  int output_stride;  // pages apart in the banks
};

SVDQ_HOST_DEVICE constexpr SelectLayout select_layout(const SelectWorkspace& workspace) {
  SelectLayout at{};
  at.output_stride = workspace.output_tiles * 8 + 8;
  at.codes = workspace.rotation_steps * kWarpSize * 16;
  at.outputs = at.codes + kChunkPages * workspace.code_bytes;
  at.weights = at.outputs + kChunkPages * at.output_stride * 4;
  at.steps = at.weights + kChunkPages * kSelectQuads * workspace.tile_rows * 4;
  at.offsets = at.steps + kChunkPages * kSelectQuads * workspace.tile_rows * 4;
  at.states = at.offsets + kChunkPages * workspace.tile_rows * 4;
  at.quads = at.states + kSelectWarps * workspace.tile_rows * 8;
  at.norms = at.quads + kSelectQuads * static_cast<int>(sizeof(SelectQuad));
  at.pages = at.norms + workspace.tile_rows * 4;
  at.bytes = at.pages + kChunkPages * 4;
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
class PageChunk {
 public:
  // Page i of the run is page first + i * stride of the sequence, if that is below `end`.
  SVDQ_DEVICE PageChunk(const SelectParams& p, const SelectWorkspace& workspace,
                        const HeadTable& heads, int head_index, int first, int stride, int end)
      : p_(p),
        workspace_(workspace),
        at_(select_layout(workspace)),
        shared_(shared_memory<SelectMemory>().bytes),
        sequence_head_(int64_t{block_z()} * p.keys.layout.num_heads + head_index),
        first_(first),
        stride_(stride),
        end_(end) {
    const HeadPlan head = head_plan(heads, head_index);
    channels_ = head.rank();
    pieces_ = proxy_bytes(head) / 16;
    k_offset_ = head.k_offset;
    if (thread_index() < channels_ / kQuad) gather_quad_at(head, thread_index());
  }

  SVDQ_DEVICE int page(int i) const { return first_ + i * stride_; }
  SVDQ_DEVICE bool has(int i) const { return page(i) < end_; }
  // True if page i of the chunk is in the sequence and in the pool. After begin().
  SVDQ_DEVICE bool known(int i) const { return load(&array<int32_t>(at_.pages)[i]) >= 0; }
  SVDQ_DEVICE int64_t sequence_head() const { return sequence_head_; }

  // Starts to copy codes, and puts the rotations of the pages in order. Contains barriers.
  SVDQ_DEVICE void begin() {
    if (thread_index() < kChunkPages) {
      const int64_t row = int64_t{block_z()} * p_.keys.table_stride;
      const int id =
          has(thread_index()) ? load(&p_.keys.page_table[row + page(thread_index())]) : -1;
      store(&array<int32_t>(at_.pages)[thread_index()], id < p_.keys.num_pages ? id : -1);
    }
    sync_threads();
    for (int i = thread_index(); i < kChunkPages * pieces_; i += kSelectThreads) {
      const int page = i / pieces_, piece = i % pieces_;
      const int64_t id = load(&array<int32_t>(at_.pages)[page]);
      if (id < 0) continue;
      copy_async(shared_ + at_.codes + page * workspace_.code_bytes + piece * 16,
                 p_.keys.pages + id * p_.keys.layout.k_page_bytes + k_offset_ + piece * 16);
    }
    commit_copies();
    // A lane has pairs c and c + 4 of a step, of pages g and g + 8.
    const int half = select_half(p_), g = lane_index() / 4;
    const Floats2* rotates[2];
    SVDQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t at = int64_t{block_z()} * workspace_.max_pages + page(g + 8 * i);
      rotates[i] = has(g + 8 * i) ? workspace_.page_rotation + at * half : nullptr;
    }
    for (int step = warp_index(); step < workspace_.rotation_steps; step += kSelectWarps) {
      Words4 a{};
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {
        const int pair = step * 8 + w / 2 * 4 + lane_index() % 4;
        if (pair >= half || !rotates[w % 2]) continue;
        const Floats2 turn = load(&rotates[w % 2][pair]);
        a.word[w] = pack_half2(turn.x, turn.y);
      }
      store(&array<Words4>(at_.rotates)[step * kWarpSize + lane_index()], a);
    }
    sync_threads();
  }

  // Weights of the channels for tile `tile`; norm(row) comes off the rows' scores. Contains
  // barriers.
  template <typename Norm>
  SVDQ_DEVICE void prepare(int tile, const Norm& norm) {
    if (thread_index() < kRows)
      store(&array<float>(at_.norms)[thread_index()], norm(tile, thread_index()));
    const int64_t first = select_tile(workspace_, sequence_head_, tile) * workspace_.output_tiles;
    const int outputs = (channels_ + 1) * kRows;
    for (int t = warp_index(); t * 8 < outputs; t += kSelectWarps) {
      float sum[4] = {};
      const Words2* fragments =
          workspace_.fragments + (first + t) * workspace_.rotation_steps * kWarpSize;
      for (int step = 0; step < workspace_.rotation_steps; ++step) {
        const Words4 a = load(&array<Words4>(at_.rotates)[step * kWarpSize + lane_index()]);
        const Words2 b = load(&fragments[step * kWarpSize + lane_index()]);
        MmaHalf::run(sum, a.word, b.word);
      }
      const int64_t column = (first + t) * 8 + lane_index() % 4 * 2;
      const Floats2 unit = load(reinterpret_cast<const Floats2*>(&workspace_.step[column]));
      const Floats2 constant = load(reinterpret_cast<const Floats2*>(&workspace_.constant[column]));
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
    round_folded();
    wait_copies<0>();
    sync_threads();
  }

  // The page of the run that this thread scores tokens of, and the first token of its run `run`.
  SVDQ_DEVICE static int own_page() { return thread_index() / kPageThreads; }
  SVDQ_DEVICE static int first_token(int run) {
    return run * kTokenChunks * kLanes + thread_index() % kPageThreads * 4;
  }

  // Scores, in units of log2, of this thread's runs `run` and on.
  SVDQ_DEVICE void score(int run, float (&score)[kChunksAtOnce<kRows>][4][kRows]) const {
    constexpr int kRuns = kChunksAtOnce<kRows>;
    const int page = own_page();
    const float* offsets = array<float>(at_.offsets) + page * kRows;
    const float* steps = array<float>(at_.steps) + page * kSelectQuads * kRows;
    const uint32_t* weights = array<uint32_t>(at_.weights) + page * kSelectQuads * kRows;
    const int group = first_token(run) / kLanes, piece = thread_index() % 4;
    const uint8_t* codes = shared_ + at_.codes + page * workspace_.code_bytes + piece * 16;
    int sum[kRuns][4][kRows];
    SVDQ_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float offset = load(&offsets[r]);
      SVDQ_UNROLL
      for (int t = 0; t < 4 * kRuns; ++t) {
        score[t / 4][t % 4][r] = offset;
        sum[t / 4][t % 4][r] = kFloatBase;
      }
    }
    for (int q = 0; q < channels_ / kQuad; ++q) {
      const SelectQuad quad = load(&array<SelectQuad>(at_.quads)[q]);
      const int width = 8 >> quad.width;
      const uint32_t mask = ((1u << width) - 1) * 0x01010101u;
      uint32_t weight[kRows];
      load_words(weights + q * kRows, weight);
      SVDQ_UNROLL
      for (int i = 0; i < kRuns; ++i) {
        const int unit = quad.unit + group + i * kTokenChunks;
        const int shift = (unit & ((1 << quad.width) - 1)) * width;
        const Words4 lanes = load(
            reinterpret_cast<const Words4*>(codes + quad.line + (unit >> quad.width) * kLineBytes));
        SVDQ_UNROLL
        for (int t = 0; t < 4; ++t) {
          const uint32_t four = lanes.word[t] >> shift & mask;
          SVDQ_UNROLL
          for (int r = 0; r < kRows; ++r) sum[i][t][r] = dot4(four, weight[r], sum[i][t][r]);
        }
      }
      if (!quad.is_last) continue;
      uint32_t step[kRows];
      load_words(reinterpret_cast<const uint32_t*>(steps) + q * kRows, step);
      SVDQ_UNROLL
      for (int r = 0; r < kRows; ++r) {
        SVDQ_UNROLL
        for (int t = 0; t < 4 * kRuns; ++t) {
          float& x = score[t / 4][t % 4][r];
          x = fused(sum_as_float(sum[t / 4][t % 4][r]), int_as_float(step[r]), x);
          sum[t / 4][t % 4][r] = kFloatBase;
        }
      }
    }
  }

  SVDQ_DEVICE RowState* states() const { return array<RowState>(at_.states); }

 private:
  template <typename T>
  SVDQ_DEVICE T* array(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  // Finds the band of a quad, and where in it the quad is.
  SVDQ_DEVICE void gather_quad_at(const HeadPlan& head, int quad) {
    int first = 0, bytes = 0;  // quads and bytes of the bands before
    SVDQ_UNROLL
    for (int band = 0; band < 2 * kNumWidths; ++band) {
      const int w = band % kNumWidths;
      const int count = (band < kNumWidths ? head.pre.count[w] : head.post.count[w]) / kQuad;
      if (quad >= first && quad < first + count) {
        const int unit = (quad - first) * kGroups;
        const SelectQuad place{bytes + (unit >> w) * kLineBytes,
                               static_cast<int16_t>(unit & ((1 << w) - 1)), static_cast<int8_t>(w),
                               quad == first + count - 1};
        store(&array<SelectQuad>(at_.quads)[quad], place);
      }
      first += count;
      bytes += count * kQuad * band_width(w) * kPageTokens / 8;
    }
  }

  // A thread per page and row: signed bytes, and what middle codes contribute taken off the
  // constant with the rounded weights.
  SVDQ_DEVICE void round_folded() {
    const int page = thread_index() / kRows, row = thread_index() % kRows;
    if (page >= kChunkPages) return;
    const float* outputs = array<float>(at_.outputs) + page * at_.output_stride + row;
    uint32_t* weights = array<uint32_t>(at_.weights) + page * kSelectQuads * kRows + row;
    float* steps = array<float>(at_.steps) + page * kSelectQuads * kRows + row;
    float offset = load(&outputs[channels_ * kRows]) - load(&array<float>(at_.norms)[row]);
    for (int first = 0, last = 0; first < channels_ / kQuad; first = ++last) {
      float largest = 0.0f;
      SelectQuad quad = load(&array<SelectQuad>(at_.quads)[last]);
      for (;; quad = load(&array<SelectQuad>(at_.quads)[++last])) {
        SVDQ_UNROLL
        for (int e = 0; e < kQuad; ++e) {
          const float x = load(&outputs[(last * kQuad + e) * kRows]);
          largest = x > largest ? x : -x > largest ? -x : largest;
        }
        if (quad.is_last) break;
      }
      const float step = largest * (1.0f / 127), inverse = step > 0.0f ? 127 / largest : 0.0f;
      int sum = 0;
      for (int q = first; q <= last; ++q) {
        uint32_t bytes = 0;
        SVDQ_UNROLL
        for (int e = 0; e < kQuad; ++e) {
          const int x = round_to_int(load(&outputs[(q * kQuad + e) * kRows]) * inverse);
          sum += x;
          bytes |= (static_cast<uint32_t>(x) & 0xff) << (8 * e);
        }
        store(&weights[q * kRows], bytes);
      }
      const float middle = static_cast<float>((1 << (8 >> quad.width)) - 1) / 2;
      offset = fused(static_cast<float>(sum) * middle, -step, offset);
      store(&steps[last * kRows], step);
    }
    store(&array<float>(at_.offsets)[page * kRows + row], offset);
  }

  const SelectParams& p_;
  const SelectWorkspace& workspace_;
  SelectLayout at_;
  uint8_t* shared_;
  int64_t sequence_head_, k_offset_;
  int first_, stride_, end_;
  int channels_, pieces_;  // leading channels, and 16-byte pieces of their lines
};

}  // namespace svdq::device
