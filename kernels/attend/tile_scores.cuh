// Scores of the 64 tokens of a packed page for the 16 query rows of a warp, in units of log2, in the
// order of kernels/attend/tile_rows.cuh.
#pragma once

#include "kernels/machine/fragments.cuh"
#include "kernels/attend/fold_query.cuh"
#include "kernels/attend/tile_rows.cuh"
#include "kernels/attend/token_slots.cuh"

namespace svdq::device {

// Adds codes of 16 channels times `a` to the scores of 64 tokens: channel quads 4 step .. 4 step + 3
// of a band of `quads` quads, swizzled lines in shared memory.
template <int kWidth>
SVDQ_DEVICE void add_code_scores(const uint8_t* band, int quads, int step, const Words4& a,
                                 float (&score)[2 * kGroups][4]) {
  constexpr int kUnits = 8 / kWidth;
  constexpr int kShared = kUnits < kGroups ? kUnits : kGroups;  // groups of a lane
  const int quad = step * 4 + lane_index() % 4, row = lane_index() / 4;
  SVDQ_UNROLL
  for (int first = 0; first < kGroups; first += kShared) {
    const int unit = quad * kGroups + first;
    const int piece = swizzle<kWidth>(unit / kUnits * 4 + row / 2);
    Words2 lanes{};  // tokens 2 row and 2 row + 1
    if (quad < quads) lanes = load(reinterpret_cast<const Words2*>(band + piece * 16) + row % 2);
    SVDQ_UNROLL
    for (int i = 0; i < kShared; ++i) {
      SVDQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t b[2];
        unpack_quad<kWidth>(lanes.word[h], unit % kUnits + i, b[0], b[1]);
        MmaHalf::run(score[2 * (first + i) + h], a.word, b);
      }
    }
  }
}

// post-RoPE channels, coded after RoPE: codes times folded queries.
template <int kDimension>
class FoldedTiles {
 public:
  static constexpr int kDim = kDimension;
  static constexpr bool kGathered = false;
  using Lean = FoldedTiles;               // the scorer that leaves values the most registers
  static constexpr int kSharedBytes = 0;  // next to the queries
  using Parts = PostPart;

  // A barrier must follow before the first page.
  SVDQ_DEVICE FoldedTiles(uint8_t* shared, const AttendParams& p, const AttendWorkspace& workspace,
                          const BlockRows& rows, const HeadPlan& head, WarpShare share)
      : bands_(head.post) {
    // The B operands of two row tiles are the halves of an A operand.
    Words4* query = reinterpret_cast<Words4*>(shared);
    const int64_t tile = rows.sequence_head * workspace.row_tiles + rows.tile;
    const int tile_words = max_steps(p.keys.layout.head_dim) * kWarpSize;
    const Words2* weights = workspace.folded.fragments + tile * tile_words;
    int steps = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) { steps += band_steps(count); });
    for (int pair = 0; pair < workspace.page_tiles / 2; ++pair) {
      for (int i = thread_index(); i < steps * kWarpSize;
           i += tile_threads<kDim>(workspace.page_tiles)) {
        const Words2 upper = load(&weights[2 * pair * tile_words + i]);
        const Words2 lower = load(&weights[(2 * pair + 1) * tile_words + i]);
        store(&query[pair * steps * kWarpSize + i],
              Words4{{upper.word[0], lower.word[0], upper.word[1], lower.word[1]}});
      }
    }
    query_ = query + share.pair * steps * kWarpSize;
    for (int i = 0; i < 2; ++i) {
      const int64_t row = tile * kRowTile + share.pair * kWarpRows + lane_index() / 4 + i * 8;
      unit_[i] = load(&workspace.folded.step[row]) * kCodeUnit;
      offset_[i] = load(&workspace.folded.offset[row]);
    }
  }

  SVDQ_DEVICE void score(const uint8_t* keys, int, float (&score)[2 * kGroups][4]) {
    SVDQ_UNROLL
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) score[tile][e] = 0.0f;
    }
    const Words4* query = query_;
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i, query += kWarpSize) {
        const Words4 a = load(&query[lane_index()]);
        add_code_scores<kWidth>(keys, count / kQuad, i, a, score);
      }
      keys += band_bytes(kWidth, count);
    });
    SVDQ_UNROLL
    for (int tile = 0; tile < 2 * kGroups; ++tile) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) score[tile][e] = score[tile][e] * unit_[e / 2] + offset_[e / 2];
    }
  }

 private:
  const Words4* query_;
  Bands bands_;
  float unit_[2], offset_[2];  // of this thread's rows
};

// pre-RoPE channels, coded before RoPE: the block reconstructs the columns of all 64 tokens once, up to 128
// columns at a time, rotates them by the tokens' positions and leaves them in shared memory as
// halves, where every warp multiplies them with its queries.
//
// A warp reconstructs kTilesAtOnce tiles of 8 columns at a time: what is left of the registers.
template <int kDimension, int kTilesAtOnce = kDimension == 128 ? 4 : 2, bool kGatheredPages = false>
class ReconstructedTiles {
 public:
  static constexpr int kDim = kDimension;
  static constexpr bool kGathered = kGatheredPages;
  using Lean = ReconstructedTiles<kDim, 2, kGatheredPages>;
  static constexpr int kChunk = kDim < 128 ? kDim : 128;  // columns at a time
  using Matrix = TokenMatrix<kChunk>;
  static constexpr int kSharedBytes = kPageTokens * Matrix::kRowBytes;
  using Parts = PrePart;

  // A barrier must follow before the first page.
  SVDQ_DEVICE ReconstructedTiles(uint8_t* shared, const AttendParams& p,
                                 const AttendWorkspace& workspace, const BlockRows& rows,
                                 const HeadPlan& head, WarpShare share)
      : bands_(head.pre),
        dim_(p.keys.layout.head_dim),
        rotary_pairs_(p.keys.codec.rope.rotary_pairs),
        warps_(tile_threads<kDim>(workspace.page_tiles) / kWarpSize),
        offset_rotation_(workspace.offset_rotation),
        page_rotation_(workspace.page_rotation + int64_t{rows.sequence} * workspace.max_pages *
                                                     p.keys.codec.rope.rotary_pairs),
        token_rotations_(p, workspace, rows) {
    const int64_t tile = rows.sequence_head * (dim_ / kRowTile);
    folded_ = workspace.columns.fragments + tile * max_steps(dim_) * kWarpSize;
    unit_ = workspace.columns.step + tile * kRowTile;
    offset_ = workspace.columns.offset + tile * kRowTile;

    Words4* query = reinterpret_cast<Words4*>(shared);
    const int steps = dim_ / 16;
    for (int i = thread_index(); i < workspace.page_tiles / 2 * steps * kWarpSize;
         i += warps_ * kWarpSize) {
      const int pair = i / (steps * kWarpSize), step = i / kWarpSize % steps;
      Words4 a;
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {
        float q[2];
        SVDQ_UNROLL
        for (int e = 0; e < 2; ++e) {
          const Coord at = FragmentA16::coord(lane_index(), 2 * w + e);
          const int row = pair * kWarpRows + at.row;
          const int channel = column_channel(step * 16 + at.col, rotary_pairs_);
          q[e] = row < rows.count ? load_query(p, rows, row, channel) : 0.0f;
        }
        a.word[w] = pack_half2(q[0], q[1]);
      }
      store(&query[i], a);
    }
    query_ = query + share.pair * steps * kWarpSize;
    keys_ = shared + query_operand_bytes(workspace.page_tiles, steps);
  }

  // Contains barriers.
  SVDQ_DEVICE void score(const uint8_t* codes, int page, float (&score)[2 * kGroups][4]) {
    add(codes, page, score, [&] {
      SVDQ_UNROLL
      for (int tile = 0; tile < 2 * kGroups; ++tile) {
        SVDQ_UNROLL
        for (int e = 0; e < 4; ++e) score[tile][e] = 0.0f;
      }
    });
  }

  // Adds to the scores that begin() sets, late, since registers are short while keys are
  // reconstructed. Contains barriers.
  template <typename Begin>
  SVDQ_DEVICE void add(const uint8_t* codes, int page, float (&score)[2 * kGroups][4],
                       const Begin& begin) {
    if constexpr (kDim <= kChunk) {
      reconstruct(codes, page, 0, dim_);
      begin();
      Matrix::template add_scores<MmaHalf>(keys_, query_, dim_ / 16, score);
    } else {
      begin();
      for (int first = 0; first < dim_; first += kChunk) {
        const int end = first + kChunk < dim_ ? first + kChunk : dim_;
        if (first != 0) sync_threads();
        reconstruct(codes, page, first, end);
        Matrix::template add_scores<MmaHalf>(keys_, query_ + first / 16 * kWarpSize,
                                             (end - first) / 16, score);
      }
    }
  }

 private:
  static constexpr int kKeyTiles = kTilesAtOnce;

  // Columns first .. end - 1 of all tokens, by all warps.
  SVDQ_DEVICE void reconstruct(const uint8_t* codes, int page, int first, int end) {
    for (int tile = first / kRowTile + warp_index() * kKeyTiles; tile * kRowTile < end;
         tile += warps_ * kKeyTiles)
      reconstruct_tiles(codes, page, tile, first);
    sync_threads();
  }

  SVDQ_DEVICE void reconstruct_tiles(const uint8_t* codes, int page, int first_tile,
                                     int first_column) {
    float key[kGroups][kKeyTiles][4] = {};
    int step = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i, ++step) {
        uint32_t a[kGroups][4];
        SVDQ_UNROLL
        for (int group = 0; group < kGroups; ++group)
          load_key_fragment<kWidth>(codes, count / kQuad, i, group, a[group]);
        SVDQ_UNROLL
        for (int t = 0; t < kKeyTiles; ++t) {
          if ((first_tile + t) * kRowTile >= dim_) break;
          const int64_t at = (int64_t{first_tile + t} * max_steps(dim_) + step) * kWarpSize;
          const Words2 b = load(&folded_[at + lane_index()]);
          SVDQ_UNROLL
          for (int group = 0; group < kGroups; ++group)
            MmaHalf::run(key[group][t], a[group], b.word);
        }
      }
      codes += band_bytes(kWidth, count);
    });
    SVDQ_UNROLL
    for (int t = 0; t < kKeyTiles; ++t) {
      const int column = (first_tile + t) * kRowTile;
      if (column >= dim_) break;
      store_columns(key, t, page, column, (column - first_column) / kRowTile);
    }
  }

  // Units and mean of this thread's two columns and their rotation by every token's position.
  SVDQ_DEVICE void store_columns(const float (&key)[kGroups][kKeyTiles][4], int t, int page,
                                 int first_column, int piece) {
    const int column = first_column + lane_index() % 4 * 2;
    Floats2 unit = load(reinterpret_cast<const Floats2*>(&unit_[column]));
    unit = {unit.x * kCodeUnit, unit.y * kCodeUnit};
    const Floats2 offset = load(reinterpret_cast<const Floats2*>(&offset_[column]));
    const bool rotates = column < 2 * rotary_pairs_;
    const uint64_t pair_frequency =
        kGatheredPages && rotates ? token_rotations_.pair_frequency(column / 2) : 0;
    Floats2 first{1.0f, 0.0f};
    if (!kGatheredPages && rotates)
      first = load(&page_rotation_[int64_t{page} * rotary_pairs_ + column / 2]);
    SVDQ_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x = key[group][t][2 * half] * unit.x + offset.x;
        float y = key[group][t][2 * half + 1] * unit.y + offset.y;
        const int token = group * kLanes + half * 8 + lane_index() / 4;
        if (rotates) {
          Floats2 turn;
          if constexpr (kGatheredPages) {
            turn = token_rotations_.at(pair_frequency, page, token);
          } else {
            turn = add_rotations(
                first, load(&offset_rotation_[int64_t{token} * rotary_pairs_ + column / 2]));
          }
          const float rotated = x * turn.x - y * turn.y;
          y = y * turn.x + x * turn.y;
          x = rotated;
        }
        uint8_t* to = keys_ + Matrix::offset(token, piece) + lane_index() % 4 * 4;
        store(reinterpret_cast<uint32_t*>(to), pack_half2(x, y));
      }
    }
  }

  const Words4* query_;
  uint8_t* keys_;
  Bands bands_;
  int dim_, rotary_pairs_, warps_;
  const Words2* folded_;
  const float* unit_;
  const float* offset_;
  const Floats2* offset_rotation_;
  const Floats2* page_rotation_;
  TokenRotations token_rotations_;
};

// Hybrid keys: the scores of post-RoPE channels, to which those of pre-RoPE channels are added. Shared
// memory is what pre-RoPE channels need, then the folded queries. pre-RoPE channels are few, so reading
// them again for every tile of columns costs little, and registers are short.
template <int kDimension, bool kGatheredPages = false>
class HybridTiles {
 public:
  static constexpr int kDim = kDimension;
  static constexpr bool kGathered = kGatheredPages;
  using PreRope = ReconstructedTiles<kDim, 1, kGatheredPages>;
  using PostRope = FoldedTiles<kDim>;
  using Parts = BothParts;
  using Lean = HybridTiles;
  static constexpr int kSharedBytes = PreRope::kSharedBytes + PostRope::kSharedBytes;

  // A barrier must follow before the first page.
  SVDQ_DEVICE HybridTiles(uint8_t* shared, const AttendParams& p, const AttendWorkspace& workspace,
                          const BlockRows& rows, const HeadPlan& head, WarpShare share)
      : pre_(shared, p, workspace, rows, head, share),
        post_(shared + query_operand_bytes(workspace.page_tiles, p.keys.layout.head_dim / 16) +
                  PreRope::kSharedBytes,
              p, workspace, rows, head, share),
        pre_bytes_(head.pre.page_bytes()) {}

  // Contains barriers.
  SVDQ_DEVICE void score(const uint8_t* codes, int page, float (&score)[2 * kGroups][4]) {
    pre_.add(codes, page, score, [&] { post_.score(codes + pre_bytes_, page, score); });
  }

 private:
  PreRope pre_;
  PostRope post_;
  int pre_bytes_;
};

}  // namespace svdq::device
