// Shared by the tiled kernels of the attend stage, for calls with more than 8 query rows a KV head.
//
// A warp serves 16 query rows, a block up to 64, and all of them use each page that the block
// loads. Here tensor-core products have query rows for rows: scores [16 rows, 8 tokens], outputs
// [16 rows, 8 channels]. So a thread keeps the scores of its two rows, softmax needs no other warp,
// and probabilities become the next product's A operand without leaving their registers.
//
// For this, column n of score tile 2 g + h stands for token 16 g + 2 n + h of the page: a thread of
// lane l then holds, in elements 0 and 1 of tiles 2 g and 2 g + 1, tokens 0, 2, 1, 3 of the quad at
// 16 g + 4 (l % 4), in the order in which value codes come apart (quad_element).
#pragma once

#include "kernels/attend/plan.cuh"

namespace svdq::device {

inline constexpr int kWarpRows = 2 * kRowTile;  // query rows of a warp

// Warps that share 16 rows, each with a part of the output's channels: what registers have room
// for.
template <int kDim>
inline constexpr int kWarpParts = kDim <= 128   ? 1
                                  : kDim <= 256 ? 2
                                                : 4;

// Threads and 8-row tiles of the largest block.
template <int kDim>
inline constexpr int kTileThreads = kDim <= 128 ? 128 : 256;
template <int kDim>
inline constexpr int kMaxTiles = 2 * kTileThreads<kDim> / kWarpSize / kWarpParts<kDim>;

// A block of `tiles` 8-row tiles has a warp for every two of them and part.
template <int kDim>
SVDQ_HOST_DEVICE constexpr int tile_threads(int tiles) {
  return tiles / 2 * kWarpParts<kDim> * kWarpSize;
}

// Bytes of the queries' A operands of a block: `steps` of 16 channels.
SVDQ_HOST_DEVICE constexpr int query_operand_bytes(int tiles, int steps) {
  return tiles / 2 * steps * kWarpSize * static_cast<int>(sizeof(Words4));
}

// Shared memory: the queries' operands, what scores need, then the stages.
struct TileMemory {
  alignas(16) uint8_t bytes[16];  // more follow
};

// The share of one warp.
struct WarpShare {
  int pair;  // of row tiles of the block
  int part;  // of the output's channels
};

template <int kDim>
SVDQ_DEVICE WarpShare warp_share() {
  return {warp_index() / kWarpParts<kDim>, warp_index() % kWarpParts<kDim>};
}

// Token of element `e` of score tile `tile`; its row is lane / 4 + e / 2 * 8.
SVDQ_DEVICE int score_token(int tile, int e) {
  return tile / 2 * kLanes + lane_index() % 4 * kQuad + (e & 1) * 2 + (tile & 1);
}

// The numbers that tensor cores take, 16 bits each. A float number is a sum of kTerms of them,
// times 1 / kUnit, to the rounding of a float or nearly so.
template <DataType kType>
struct Numbers16;

template <>
struct Numbers16<DataType::kFloat16> {
  using Mma = MmaHalf;
  static constexpr int kTerms = 2;
  static constexpr float kUnit = 0x1p14f;  // probabilities below 2^-14 keep their digits
  SVDQ_DEVICE static uint32_t pack(float low, float high) { return pack_half2(low, high); }
  SVDQ_DEVICE static float low(uint32_t pair) { return half_to_float(uint16_t(pair)); }
  SVDQ_DEVICE static float high(uint32_t pair) { return half_to_float(uint16_t(pair >> 16)); }
};

template <>
struct Numbers16<DataType::kBFloat16> {
  using Mma = MmaBFloat16;
  static constexpr int kTerms = 3;
  static constexpr float kUnit = 1.0f;
  SVDQ_DEVICE static uint32_t pack(float low, float high) { return pack_bfloat162(low, high); }
  SVDQ_DEVICE static float low(uint32_t pair) { return int_as_float(pair << 16); }
  SVDQ_DEVICE static float high(uint32_t pair) { return int_as_float(pair & 0xffff0000u); }
};

// A matrix [tokens, kColumns] of 16-bit numbers in shared memory. The 16-byte pieces of a row are
// exchanged so that eight rows meet different banks, be they neighbours (written) or every second
// one (read by LoadMatrix in the order of score tiles).
template <int kColumns>
struct TokenMatrix {
  static constexpr int kRowBytes = kColumns * 2;
  static constexpr int kPieces = kColumns / 8;
  static_assert(kPieces % 8 == 0);

  SVDQ_DEVICE static int offset(int token, int piece) {
    return token * kRowBytes + (piece ^ ((token & 7) ^ (token >> 3 & 1))) * 16;
  }

  // Starts to copy `tokens` rows of `columns` numbers that follow each other; a row for which
  // `counts(token)` is false becomes zeros.
  template <typename Counts>
  SVDQ_DEVICE static void copy(uint8_t* to, const void* from, int tokens, int columns, int threads,
                               const Counts& counts) {
    const uint8_t* bytes = static_cast<const uint8_t*>(from);
    for (int i = thread_index(); i < tokens * kPieces; i += threads) {
      const int token = i / kPieces, piece = i % kPieces;
      if (piece * 8 >= columns) continue;
      copy_async(to + offset(token, piece), bytes + (int64_t{token} * columns + piece * 8) * 2,
                 counts(token) ? 16 : 0);
    }
  }

  // Adds queries [16 rows, 16 steps] times rows of the matrix to scores of kTiles * 8 tokens.
  template <typename Mma, int kTiles>
  SVDQ_DEVICE static void add_scores(const uint8_t* matrix, const Words4* query, int steps,
                                     float (&score)[kTiles][4]) {
    const int number = lane_index() / 8, row = lane_index() % 8;  // this lane's row of a matrix
    for (int step = 0; step < steps; ++step) {
      const Words4 a = load(&query[step * kWarpSize + lane_index()]);
      SVDQ_UNROLL
      for (int group = 0; group < kTiles / 2; ++group) {
        const int token = group * kLanes + 2 * row + number / 2;
        uint32_t b[4];
        LoadMatrix<4>::run(b, matrix + offset(token, step * 2 + number % 2));
        Mma::run(score[2 * group], a.word, {b[0], b[1]});
        Mma::run(score[2 * group + 1], a.word, {b[2], b[3]});
      }
    }
  }
};

// Turns the scores of a warp's rows into probabilities relative to the rows' new maxima. `factor`
// is what the rows' sums so far shrink by. A thread's state.sum is its part of the row's.
template <int kTiles>
SVDQ_DEVICE void softmax_tiles(float (&score)[kTiles][4], RowState (&state)[2],
                               float (&factor)[2]) {
  SVDQ_UNROLL
  for (int i = 0; i < 2; ++i) {
    float most = no_score();
    SVDQ_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SVDQ_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) most = score[tile][e] > most ? score[tile][e] : most;
    }
    SVDQ_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = shuffle_xor(most, mask);
      most = other > most ? other : most;
    }
    factor[i] = raise_max(state[i], most);
    SVDQ_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SVDQ_UNROLL
      for (int e = 2 * i; e < 2 * i + 2; ++e) {
        score[tile][e] = probability(score[tile][e], state[i].max);
        state[i].sum += score[tile][e];
      }
    }
  }
}

// Writes the maxima and sums of a warp's rows; with `readable` false what makes results NaN.
SVDQ_DEVICE void write_tile_states(const RowState (&state)[2], const AttendWorkspace& workspace,
                                   const BlockRows& rows, WarpShare share, int split, bool valid) {
  for (int i = 0; i < 2; ++i) {
    float sum = state[i].sum;
    for (int mask = 1; mask <= 2; mask *= 2) sum += shuffle_xor(sum, mask);
    if (share.part != 0 || lane_index() % 4 != 0) continue;
    const int row = share.pair * kWarpRows + lane_index() / 4 + i * 8;
    const int64_t at = rows.slot(workspace.row_tiles, row) * workspace.splits() + split;
    store(&workspace.partial_max[at], valid ? state[i].max : poisoned_score());
    store(&workspace.partial_sum[at], sum);
  }
}

// The first row of a warp's partial results.
SVDQ_DEVICE float* tile_output(const AttendWorkspace& workspace, const BlockRows& rows,
                               WarpShare share, int split, int dim) {
  const int64_t slot = rows.slot(workspace.row_tiles, share.pair * kWarpRows);
  return workspace.partial_out + (slot * workspace.splits() + split) * dim;
}

}  // namespace svdq::device
