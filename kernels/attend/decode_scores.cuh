// Scores of the 64 tokens of a packed page for 8 query rows, by one warp, in units of log2.
//
// Row r of score tile s stands for token 16 (r / 2) + 4 s + 2 (r % 2), row r + 8 for the token after
// it. So, of thread 4 r + c, elements 0 and 1 of the tile are that token's scores for query rows 2 c
// and 2 c + 1, elements 2 and 3 those of the next token, and transposed tiles are operands of the
// product with values (PageProbabilities).
#pragma once

#include "kernels/attend/fold_query.cuh"
#include "kernels/attend/token_slots.cuh"

namespace svdq::device {

// First of the two tokens that this thread holds of score tile `tile`.
SVDQ_DEVICE int decode_token(int tile) {
  return lane_index() / 8 * kLanes + tile * kQuad + lane_index() / 4 % 2 * 2;
}

// Index of 16-byte piece `i` of a band of key lines in shared memory, as swizzle() for what is
// read here: 8 bytes a thread, by four threads with neighbouring quads and four with two pairs of
// tokens of two groups.
template <int kWidth>
SVDQ_HOST_DEVICE constexpr int decode_swizzle(int i) {
  return kWidth == 8 ? i ^ (i >> 4 & 3) : swizzle<kWidth>(i);
}

// Starts a warp's copy of the key lines of a page of one head.
template <typename Parts>
SVDQ_DEVICE void copy_decode_keys(uint8_t* to, const uint8_t* keys, const HeadPlan& head) {
  Parts::for_each(head, [&]<int kWidth>(int count) {
    const int pieces = band_bytes(kWidth, count) / 16;
    for (int i = lane_index(); i < pieces; i += kWarpSize)
      copy_async(to + decode_swizzle<kWidth>(i) * 16, keys + i * 16);
    to += pieces * 16;
    keys += pieces * 16;
  });
}

// Address of this thread's share of the A operands of one k-step of a band: 16 channels. A channel
// past the band's end has weight 0, so there any quad will do.
template <int kWidth>
class DecodeKeys {
 public:
  SVDQ_DEVICE DecodeKeys(const uint8_t* band, int step, int quads) : band_(band) {
    const int wanted = step * 4 + lane_index() % 4;
    const int unit = (wanted < quads ? wanted : quads - 1) * kGroups + lane_index() / 8;
    offset_ = decode_swizzle<kWidth>(unit / kUnits * 4) * 16 + lane_index() / 4 % 2 * 8;
    shift_ = unit % kUnits * kWidth;
  }

  // A operand [16 tokens, 16 channels] of score tile `tile`: its piece of a line differs in the
  // bits that the swizzle leaves to it.
  SVDQ_DEVICE void load_tile(int tile, uint32_t (&a)[4]) const {
    constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x00010001u;
    const Words2 lanes = load(reinterpret_cast<const Words2*>(band_ + (offset_ ^ (tile * 16))));
    SVDQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t codes = lanes.word[h] >> shift_;
      a[h] = codes & kMask;
      a[h + 2] = codes >> 8 & kMask;
    }
  }

 private:
  static constexpr int kUnits = 8 / kWidth;
  const uint8_t* band_;
  int offset_, shift_;
};

// post-RoPE channels, coded after RoPE: codes times folded queries.
template <int kDimension>
class FoldedDecode {
 public:
  static constexpr int kDim = kDimension;
  struct Shared {
    alignas(16) Words2 weights[max_steps(kDim)][kWarpSize];
  };
  using Parts = PostPart;

  // All `threads` of the block take part; a barrier must follow before the first page.
  SVDQ_DEVICE FoldedDecode(Shared& s, const AttendParams& p, const AttendWorkspace& workspace,
                           const BlockRows& rows, const HeadPlan& head, int threads)
      : s_(s), bands_(head.post) {
    const int64_t tile = rows.sequence_head * workspace.row_tiles + rows.tile;
    const Words2* weights =
        workspace.folded.fragments + tile * max_steps(p.keys.layout.head_dim) * kWarpSize;
    int steps = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) { steps += band_steps(count); });
    for (int i = thread_index(); i < steps * kWarpSize; i += threads)
      store(&s.weights[i / kWarpSize][i % kWarpSize], load(&weights[i]));
    for (int i = 0; i < 2; ++i) {
      const int64_t row = tile * kRowTile + lane_index() % 4 * 2 + i;
      unit_[i] = load(&workspace.folded.step[row]) * kCodeUnit;
      offset_[i] = load(&workspace.folded.offset[row]);
    }
  }

  SVDQ_DEVICE void score(const uint8_t* keys, int, float (&score)[kGroups][4]) {
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      for (int e = 0; e < 4; ++e) score[s][e] = 0.0f;
    }
    int step = 0;
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i, ++step) {
        const DecodeKeys<kWidth> place(keys, i, count / kQuad);
        const Words2 b = load(&s_.weights[step][lane_index()]);
        SVDQ_UNROLL
        for (int s = 0; s < kGroups; ++s) {
          uint32_t a[4];
          place.load_tile(s, a);
          MmaHalf::run(score[s], a, b.word);
        }
      }
      keys += band_bytes(kWidth, count);
    });
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) score[s][e] = fused(score[s][e], unit_[e & 1], offset_[e & 1]);
    }
  }

 private:
  Shared& s_;
  Bands bands_;
  float unit_[2], offset_[2];  // of rows 2 c and 2 c + 1
};

// pre-RoPE channels, coded before RoPE: reconstructed a few columns at a time for all 64 tokens, rotated, and
// multiplied with the queries. A token's slot is 4 s, for score tile s, and a rest that depends on
// the thread alone: keys are rotated by the rest, queries back by the page's first position and 4 s,
// so that a thread reads two rotations of a pair and not one a token.
//
// Of gathered pages (kGatheredPages) keys are rotated by their whole position, and queries stay.
//
// kTilesAtOnce tiles of 8 columns at a time: what accumulators of 64 tokens leave room for.
template <int kDimension, int kTilesAtOnce = kDimension <= 256 ? 4 : 2, bool kGatheredPages = false>
class ReconstructedDecode {
 public:
  static constexpr int kDim = kDimension;
  struct Shared {
    alignas(8) float query[kRowTile][kDim + 8];  // columns; rows apart in the banks
  };
  using Parts = PrePart;

  // All `threads` of the block take part; a barrier must follow before the first page.
  SVDQ_DEVICE ReconstructedDecode(Shared& s, const AttendParams& p,
                                  const AttendWorkspace& workspace, const BlockRows& rows,
                                  const HeadPlan& head, int threads)
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
    for (int row = warp_index(); row < kRowTile; row += threads / kWarpSize) {
      for (int column = lane_index(); column < dim_; column += kWarpSize) {
        const int channel = column_channel(column, rotary_pairs_);
        store(&s.query[row][column], row < rows.count ? load_query(p, rows, row, channel) : 0.0f);
      }
    }
  }

  SVDQ_DEVICE void score(const uint8_t* keys, int page, float (&score)[kGroups][4]) {
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      for (int e = 0; e < 4; ++e) score[s][e] = 0.0f;
    }
    add(keys, page, score);
  }

  SVDQ_DEVICE void add(const uint8_t* keys, int page, float (&score)[kGroups][4]) {
    for (int tile = 0; tile * kRowTile < dim_; tile += kChunkTiles)
      add_columns(keys, page, tile, score);
  }

 private:
  static constexpr int kChunkTiles = kTilesAtOnce;

  SVDQ_DEVICE void add_columns(const uint8_t* keys, int page, int first_tile,
                               float (&score)[kGroups][4]) {
    float key[kGroups][kChunkTiles][4] = {};
    // Tiles past the last one repeat a pair, and are left out below.
    int tile_folded[kChunkTiles];
    SVDQ_UNROLL
    for (int t = 0; t < kChunkTiles; ++t) {
      const int tile = first_tile + ((first_tile + t) * kRowTile < dim_ ? t : t % 2);
      tile_folded[t] = tile * max_steps(dim_) * kWarpSize + lane_index();
    }
    for_each_band(bands_, [&]<int kWidth>(int count) {
      for (int i = 0; i < band_steps(count); ++i) {
        const DecodeKeys<kWidth> place(keys, i, count / kQuad);
        uint32_t b[kChunkTiles][2];
        SVDQ_UNROLL
        for (int t = 0; t < kChunkTiles; ++t) {
          const Words2 words = load(&folded_[tile_folded[t]]);
          tile_folded[t] += kWarpSize;
          b[t][0] = words.word[0];
          b[t][1] = words.word[1];
        }
        SVDQ_UNROLL
        for (int s = 0; s < kGroups; ++s) {
          uint32_t a[4];
          place.load_tile(s, a);
          SVDQ_UNROLL
          for (int t = 0; t < kChunkTiles; ++t) MmaHalf::run(key[s][t], a, b[t]);
        }
      }
      keys += band_bytes(kWidth, count);
    });

    SVDQ_UNROLL
    for (int t = 0; t < kChunkTiles; t += 2) {
      if ((first_tile + t) * kRowTile >= dim_) break;  // head_dim is a multiple of two tiles
      uint32_t b[kGroups][2];
      SVDQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = (first_tile + t + i) * kRowTile + lane_index() % 4 * 2;
        unrotate_queries(page, column, i, b);
        finish_columns(key, t + i, page, column);
      }
      SVDQ_UNROLL
      for (int s = 0; s < kGroups; ++s) {
        // An accumulator of two neighbouring tiles is an A operand.
        const auto& left = key[s][t];
        const auto& right = key[s][t + 1];
        const uint32_t a[4] = {pack_half2(left[0], left[1]), pack_half2(left[2], left[3]),
                               pack_half2(right[0], right[1]), pack_half2(right[2], right[3])};
        MmaHalf::run(score[s], a, b[s]);
      }
    }
  }

  // Columns `column` and the next of query row lane / 4, rotated back by the page's first position
  // and 4 s, as register `at` of the B operand of score tile s.
  SVDQ_DEVICE void unrotate_queries(int page, int column, int at, uint32_t (&b)[kGroups][2]) const {
    Floats2 q = load(reinterpret_cast<const Floats2*>(&s_.query[lane_index() / 4][column]));
    const bool rotates = !kGatheredPages && column < 2 * rotary_pairs_;
    Floats2 four = {1.0f, 0.0f};
    if (rotates) {
      q = unrotate(q, load(&page_rotation_[page * rotary_pairs_ + column / 2]));
      four = load(&offset_rotation_[kQuad * rotary_pairs_ + column / 2]);
    }
    SVDQ_UNROLL
    for (int s = 0; s < kGroups; ++s) {
      if (s > 0) q = unrotate(q, four);
      b[s][at] = pack_half2(q.x, q.y);
    }
  }

  SVDQ_DEVICE static Floats2 unrotate(const Floats2& q, const Floats2& turn) {
    return {q.x * turn.x + q.y * turn.y, q.y * turn.x - q.x * turn.y};
  }

  // Units and mean of this thread's pair of columns, then the rotation by the rest of every slot.
  SVDQ_DEVICE void finish_columns(float (&key)[kGroups][kChunkTiles][4], int t, int page,
                                  int column) const {
    const Floats2 unit = load(reinterpret_cast<const Floats2*>(&unit_[column]));
    const Floats2 offset = load(reinterpret_cast<const Floats2*>(&offset_[column]));
    const bool rotates = column < 2 * rotary_pairs_;
    const uint64_t pair_frequency =
        kGatheredPages && rotates ? token_rotations_.pair_frequency(column / 2) : 0;
    SVDQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      Floats2 turn = {1.0f, 0.0f};
      if (!kGatheredPages && rotates)
        turn = load(&offset_rotation_[(decode_token(0) + h) * rotary_pairs_ + column / 2]);
      SVDQ_UNROLL
      for (int s = 0; s < kGroups; ++s) {
        float& x = key[s][t][2 * h];
        float& y = key[s][t][2 * h + 1];
        x = fused(x, unit.x * kCodeUnit, offset.x);
        y = fused(y, unit.y * kCodeUnit, offset.y);
        if (kGatheredPages && rotates)
          turn = token_rotations_.at(pair_frequency, page, decode_token(s) + h);
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

// Hybrid keys: the scores of post-RoPE channels, to which those of pre-RoPE channels are added. pre-RoPE channels
// are few, so reading them again for every two tiles of columns costs little.
template <int kDimension, bool kGatheredPages = false>
class HybridDecode {
 public:
  static constexpr int kDim = kDimension;
  using PreRope = ReconstructedDecode<kDim, 2, kGatheredPages>;
  using PostRope = FoldedDecode<kDim>;
  using Parts = BothParts;
  struct Shared {
    typename PreRope::Shared pre;
    typename PostRope::Shared post;
  };

  SVDQ_DEVICE HybridDecode(Shared& s, const AttendParams& p, const AttendWorkspace& workspace,
                           const BlockRows& rows, const HeadPlan& head, int threads)
      : pre_(s.pre, p, workspace, rows, head, threads),
        post_(s.post, p, workspace, rows, head, threads),
        pre_bytes_(head.pre.page_bytes()) {}

  SVDQ_DEVICE void score(const uint8_t* keys, int page, float (&score)[kGroups][4]) {
    post_.score(keys + pre_bytes_, page, score);
    pre_.add(keys, page, score);
  }

 private:
  PreRope pre_;
  PostRope post_;
  int pre_bytes_;
};

}  // namespace svdq::device
