// Scores of the 64 tokens of a packed page for 8 query rows, in units of log2. A scorer leaves with
// warp w the tokens of group w: thread 4 g + c has tokens 16 w + g (elements 0, 1) and 16 w + g + 8
// (2, 3) of rows 2 c and 2 c + 1.
#pragma once

#include "kernels/attend/fold_query.cuh"
#include "kernels/attend/token_slots.cuh"

namespace svdq::device {

// post-RoPE channels, coded after RoPE: codes times folded queries.
template <int kDimension>
class FoldedScores {
 public:
  static constexpr int kDim = kDimension;
  struct Shared {
    alignas(16) Words2 weights[max_steps(kDim)][kWarpSize];
  };
  using Parts = PostPart;

  // A barrier must follow before the first page.
  SVDQ_DEVICE FoldedScores(Shared& s, const AttendParams& p, const AttendWorkspace& workspace,
                           const BlockRows& rows, const HeadPlan& head)
      : s_(s), bands_(head.post) {
    const int64_t tile = rows.sequence_head * workspace.row_tiles + rows.tile;
    const Words2* weights =
        workspace.folded.fragments + tile * max_steps(p.keys.layout.head_dim) * kWarpSize;
    int steps = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) { steps += band_steps(count); });
    for (int i = thread_index(); i < steps * kWarpSize; i += kAttendThreads)
      store(&s.weights[i / kWarpSize][i % kWarpSize], load(&weights[i]));
    for (int i = 0; i < 2; ++i) {
      const int64_t row = tile * kRowTile + lane_index() % 4 * 2 + i;
      unit_[i] = load(&workspace.folded.step[row]) * kCodeUnit;
      offset_[i] = load(&workspace.folded.offset[row]);
    }
  }

  SVDQ_DEVICE void score(const uint8_t* keys, int, float (&score)[4]) {
    float sum[4] = {};
    int step = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i, ++step) {
        uint32_t a[4];
        load_key_fragment<kWidth>(keys, count / kQuad, i, warp_index(), a);
        const Words2 b = load(&s_.weights[step][lane_index()]);
        MmaHalf::run(sum, a, b.word);
      }
      keys += band_bytes(kWidth, count);
    });
    SVDQ_UNROLL
    for (int e = 0; e < 4; ++e) score[e] = sum[e] * unit_[e & 1] + offset_[e & 1];
  }

 private:
  Shared& s_;
  Bands bands_;
  float unit_[2], offset_[2];  // of rows 2 c and 2 c + 1
};

// pre-RoPE channels, coded before RoPE: warp w reconstructs a quarter of the columns of all 64 tokens, 32 columns
// at a time, rotates them by their slot, and multiplies them with queries rotated back by the page's
// first position; the warps' parts of a score are then added in shared memory. The columns of a key
// are reconstructed once for all query rows of the tile. Of gathered pages (kGatheredPages) keys are
// rotated by their whole position, and queries stay.
template <int kDimension, bool kGatheredPages = false>
class ReconstructedScores {
 public:
  static constexpr int kDim = kDimension;
  struct Shared {
    alignas(8) float query[kRowTile][kDim + 8];  // columns; rows apart in the banks
    alignas(8) float part[kAttendWarps][kGroups][kLanes * kRowTile];
  };
  using Parts = PrePart;

  SVDQ_DEVICE ReconstructedScores(Shared& s, const AttendParams& p,
                                  const AttendWorkspace& workspace, const BlockRows& rows,
                                  const HeadPlan& head)
      : s_(s),
        bands_(head.pre),
        dim_(p.keys.layout.head_dim),
        rotary_pairs_(p.keys.codec.rope.rotary_pairs),
        offset_rotation_(workspace.offset_rotation),
        page_rotation_(workspace.page_rotation + int64_t{rows.sequence} * workspace.max_pages *
                                                     p.keys.codec.rope.rotary_pairs),
        token_rotations_(p, workspace, rows) {
    const int64_t tile = rows.sequence_head * (dim_ / kRowTile);
    folded_ = workspace.columns.fragments + tile * max_steps(dim_) * kWarpSize;
    unit_ = workspace.columns.step + tile * kRowTile;
    offset_ = workspace.columns.offset + tile * kRowTile;
    for (int row = warp_index(); row < kRowTile; row += kAttendWarps) {
      for (int column = lane_index(); column < dim_; column += kWarpSize) {
        const int channel = column_channel(column, rotary_pairs_);
        store(&s.query[row][column], row < rows.count ? load_query(p, rows, row, channel) : 0.0f);
      }
    }
  }

  // Contains a barrier.
  SVDQ_DEVICE void score(const uint8_t* keys, int page, float (&score)[4]) {
    float sum[kGroups][4] = {};
    for (int tile = warp_index() * kChunkTiles; tile * kRowTile < dim_;
         tile += kAttendWarps * kChunkTiles)
      add_columns(keys, page, tile, sum);
    const int place = lane_index() / 4 * kRowTile + lane_index() % 4 * 2;
    SVDQ_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      for (int half = 0; half < 2; ++half) {
        float* to = &s_.part[warp_index()][group][place + half * 8 * kRowTile];
        store(reinterpret_cast<Floats2*>(to),
              Floats2{sum[group][2 * half], sum[group][2 * half + 1]});
      }
    }
    sync_threads();
    for (int half = 0; half < 2; ++half) {
      float total[2] = {};
      for (int w = 0; w < kAttendWarps; ++w) {
        const float* from = &s_.part[w][warp_index()][place + half * 8 * kRowTile];
        const Floats2 part = load(reinterpret_cast<const Floats2*>(from));
        total[0] += part.x;
        total[1] += part.y;
      }
      score[2 * half] = total[0];
      score[2 * half + 1] = total[1];
    }
  }

 private:
  static constexpr int kChunkTiles =
      4;  // of 8 columns: what accumulators of 64 tokens leave room for

  // sum += keys[64 tokens, columns of 4 tiles] . queries
  SVDQ_DEVICE void add_columns(const uint8_t* keys, int page, int first_tile,
                               float (&sum)[kGroups][4]) {
    float key[kGroups][kChunkTiles][4] = {};
    int step = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i, ++step) {
        uint32_t a[kGroups][4];
        SVDQ_UNROLL
        for (int group = 0; group < kGroups; ++group)
          load_key_fragment<kWidth>(keys, count / kQuad, i, group, a[group]);
        SVDQ_UNROLL
        for (int t = 0; t < kChunkTiles; ++t) {
          if ((first_tile + t) * kRowTile >= dim_) break;
          const int64_t at = (int64_t{first_tile + t} * max_steps(dim_) + step) * kWarpSize;
          const Words2 b = load(&folded_[at + lane_index()]);
          SVDQ_UNROLL
          for (int group = 0; group < kGroups; ++group)
            MmaHalf::run(key[group][t], a[group], b.word);
        }
      }
      keys += band_bytes(kWidth, count);
    });

    SVDQ_UNROLL
    for (int t = 0; t < kChunkTiles; t += 2) {
      const int tile = first_tile + t;
      if (tile * kRowTile >= dim_) break;  // head_dim is a multiple of two tiles
      uint32_t b[2];
      for (int i = 0; i < 2; ++i) b[i] = unrotated_query(page, (tile + i) * kRowTile);
      for (int i = 0; i < 2; ++i) finish_columns(key, t + i, page, (tile + i) * kRowTile);
      SVDQ_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        // An accumulator of two neighbouring tiles is an A operand.
        const auto& left = key[group][t];
        const auto& right = key[group][t + 1];
        const uint32_t a[4] = {pack_half2(left[0], left[1]), pack_half2(left[2], left[3]),
                               pack_half2(right[0], right[1]), pack_half2(right[2], right[3])};
        MmaHalf::run(sum[group], a, b);
      }
    }
  }

  // Two columns of query row lane / 4, rotated back by the page's first position.
  SVDQ_DEVICE uint32_t unrotated_query(int page, int first_column) const {
    const int column = first_column + lane_index() % 4 * 2;
    Floats2 q = load(reinterpret_cast<const Floats2*>(&s_.query[lane_index() / 4][column]));
    if (!kGatheredPages && column < 2 * rotary_pairs_) {
      const Floats2 turn = load(&page_rotation_[int64_t{page} * rotary_pairs_ + column / 2]);
      q = {q.x * turn.x + q.y * turn.y, q.y * turn.x - q.x * turn.y};
    }
    return pack_half2(q.x, q.y);
  }

  // Units and mean of this thread's two columns, then their rotation by every token's slot.
  SVDQ_DEVICE void finish_columns(float (&key)[kGroups][kChunkTiles][4], int t, int page,
                                  int first_column) const {
    const int column = first_column + lane_index() % 4 * 2;
    const Floats2 unit = load(reinterpret_cast<const Floats2*>(&unit_[column]));
    const Floats2 offset = load(reinterpret_cast<const Floats2*>(&offset_[column]));
    const bool rotates = column < 2 * rotary_pairs_;
    const uint64_t pair_frequency =
        kGatheredPages && rotates ? token_rotations_.pair_frequency(column / 2) : 0;
    SVDQ_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float& x = key[group][t][2 * half];
        float& y = key[group][t][2 * half + 1];
        x = x * (unit.x * kCodeUnit) + offset.x;
        y = y * (unit.y * kCodeUnit) + offset.y;
        if (!rotates) continue;
        const int slot = group * kLanes + half * 8 + lane_index() / 4;
        const Floats2 turn =
            kGatheredPages ? token_rotations_.at(pair_frequency, page, slot)
                           : load(&offset_rotation_[int64_t{slot} * rotary_pairs_ + column / 2]);
        const float rotated = x * turn.x - y * turn.y;
        y = y * turn.x + x * turn.y;
        x = rotated;
      }
    }
  }

  Shared& s_;
  Bands bands_;
  int dim_, rotary_pairs_;
  const Words2* folded_;
  const float* unit_;
  const float* offset_;
  const Floats2* offset_rotation_;
  const Floats2* page_rotation_;
  TokenRotations token_rotations_;
};

// Hybrid keys: the sum of both.
template <int kDimension, bool kGatheredPages = false>
class HybridScores {
 public:
  static constexpr int kDim = kDimension;
  using PreRope = ReconstructedScores<kDim, kGatheredPages>;
  using PostRope = FoldedScores<kDim>;
  using Parts = BothParts;
  struct Shared {
    typename PreRope::Shared pre;
    typename PostRope::Shared post;
  };

  SVDQ_DEVICE HybridScores(Shared& s, const AttendParams& p, const AttendWorkspace& workspace,
                           const BlockRows& rows, const HeadPlan& head)
      : pre_(s.pre, p, workspace, rows, head),
        post_(s.post, p, workspace, rows, head),
        pre_bytes_(head.pre.page_bytes()) {}

  // Contains a barrier.
  SVDQ_DEVICE void score(const uint8_t* keys, int page, float (&score)[4]) {
    pre_.score(keys, page, score);
    float post[4];
    post_.score(keys + pre_bytes_, page, post);
    SVDQ_UNROLL
    for (int e = 0; e < 4; ++e) score[e] += post[e];
  }

 private:
  PreRope pre_;
  PostRope post_;
  int pre_bytes_;
};

}  // namespace svdq::device
