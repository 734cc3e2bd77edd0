// The product of rows of keys and a basis: latents.
#pragma once

#include <cstdint>

#include "csrc/core/scalar.h"
#include "csrc/cpu/lanes-inl.h"
#include "csrc/cpu/pack/outer_product-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// InterleavedChannels of a transposed basis, padded so that tiles never end inside a vector.
inline int padded_rank(int rank) { return static_cast<int>(round_up(rank, kLanes)); }

// basis [rank, D] bfloat16 becomes basis_t [D, padded_rank] float.
inline void transpose_basis(const uint16_t* basis, int rank, int head_dim, float* basis_t) {
  const int padded = padded_rank(rank);
  for (int d = 0; d < head_dim; ++d) {
    for (int j = 0; j < padded; ++j) {
      basis_t[d * padded + j] =
          j < rank ? bfloat16_to_float(basis[int64_t{j} * head_dim + d]) : 0.0f;
    }
  }
}

// latent [64, padded_rank] = rows [64, D] x basis_t [D, padded_rank].
inline void project_rows(const float* rows, const float* basis_t, int rank, int head_dim,
                         float* latent) {
  const int padded = padded_rank(rank);
  for (int j = 0; j < padded; j += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((padded - j) / kVecLanes, [&]<int kVecs>() {
      for (int t = 0; t < kPageTokens; t += kTileTokens) {
        outer_product_tile<kTileTokens, kVecs, false>(rows + t * head_dim, head_dim, 1, basis_t + j,
                                                      padded, head_dim, latent + t * padded + j,
                                                      padded);
      }
    });
  }
}

// Transposes latents [64, padded_rank] by square blocks: calls fn(j, t, vectors), where vectors[i] holds channel j + i
// of the tokens from t on. convert(j, t, latents) maps the vector of a token's channels before.
template <typename Convert, typename Fn>
inline void for_each_channel_block(float* latent, int rank, const Convert& convert, const Fn& fn) {
  const int padded = padded_rank(rank);
  for (int j = 0; j < rank; j += kVecLanes) {
    for (int t = 0; t < kPageTokens; t += kVecLanes) {
      F32 v[kVecLanes];
      for (int r = 0; r < kVecLanes; ++r) v[r] = convert(j, t + r, latent + (t + r) * padded + j);
      transpose(v);
      fn(j, t, v);
    }
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
