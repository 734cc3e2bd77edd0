// The project stage: rows of keys, un-rotated, centred and projected on a basis.

inline constexpr int kTileTokens = 4;  // rows of a register tile
inline constexpr int kTileVecs =
    SVDQ_TARGET == 512 ? 4 : 2;  // columns of a register tile, in vectors

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Calls fn.template operator()<n>() for the run-time n in 1 .. kTileVecs.
template <int kMax, typename Fn>
inline void with_count(int n, const Fn& fn) {
  if (n >= kMax) {
    fn.template operator()<kMax>();
  } else if constexpr (kMax > 1) {
    with_count<kMax - 1>(n, fn);
  }
}

// Calls fn<width>(count, band) for every width that has channels, widest first.
template <typename Fn>
inline void for_each_band(const Bands& bands, const Fn& fn) {
  static_assert(kWidths[0] == 8 && kWidths[1] == 4 && kWidths[2] == 2 && kWidths[3] == 1);
  if (bands.count[0]) fn.template operator()<8>(bands.count[0], 0);
  if (bands.count[1]) fn.template operator()<4>(bands.count[1], 1);
  if (bands.count[2]) fn.template operator()<2>(bands.count[2], 2);
  if (bands.count[3]) fn.template operator()<1>(bands.count[3], 3);
}

// out[m][n] (+)= sum_k a[k * a_stride_k + m * a_stride_m] * b[k][n] for a tile of kTileTokens x
// (kVecs vectors), k ascending, one fused multiply-add each: the order fixes the rounding, so
// targets with FMA agree to the last bit.
template <int kVecs, bool kAccumulate>
inline void outer_product_tile(const float* a, int64_t a_stride_m, int64_t a_stride_k,
                               const float* b, int64_t b_stride, int64_t num_k, float* out,
                               int64_t out_stride) {
  F32 acc[kTileTokens][kVecs];
  for (int m = 0; m < kTileTokens; ++m) {
    for (int v = 0; v < kVecs; ++v) {
      acc[m][v] = kAccumulate ? load<F32>(out + m * out_stride + v * kVecLanes) : F32{};
    }
  }
  for (int64_t k = 0; k < num_k; ++k) {
    F32 row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load<F32>(b + k * b_stride + v * kVecLanes);
    for (int m = 0; m < kTileTokens; ++m) {
      const F32 x = splat(a[k * a_stride_k + m * a_stride_m]);
      for (int v = 0; v < kVecs; ++v) acc[m][v] += x * row[v];
    }
  }
  for (int m = 0; m < kTileTokens; ++m) {
    for (int v = 0; v < kVecs; ++v) store(out + m * out_stride + v * kVecLanes, acc[m][v]);
  }
}

// Turns one row back: pair i by the angle whose cosine and sine are given.
inline void rotate_back(float* row, const float* cosines, const float* sines, int half) {
  int i = 0;
  for (; i + kVecLanes <= half; i += kVecLanes) {
    const F32 c = load<F32>(cosines + i), s = load<F32>(sines + i);
    const F32 x = load<F32>(row + i), y = load<F32>(row + half + i);
    store(row + i, x * c + y * s);
    store(row + half + i, y * c - x * s);
  }
  for (; i < half; ++i) {
    const float x = row[i], y = row[half + i];
    row[i] = x * cosines[i] + y * sines[i];
    row[half + i] = y * cosines[i] - x * sines[i];
  }
}

// Angles of position base + offset: those of both parts, added.
inline void add_angles(const RopeTable& table, int64_t run, int offset, float* cosines,
                       float* sines) {
  const float *base_cos = table.base_cos(run), *base_sin = table.base_sin(run);
  const float *off_cos = table.offsets().row_cos(offset),
              *off_sin = table.offsets().row_sin(offset);
  for (int i = 0; i < table.half(); ++i) {
    cosines[i] = base_cos[i] * off_cos[i] - base_sin[i] * off_sin[i];
    sines[i] = base_sin[i] * off_cos[i] + base_cos[i] * off_sin[i];
  }
}

// Keys first_token .. first_token + count - 1 of one head as float rows [64, D], un-rotated and
// less `shift` (may be null). Row r belongs to offset first_offset + r of the run. Rows from count
// on are zero.
inline void load_rows(const TokenSource& keys, int head, int head_dim, int64_t first_token,
                      int count, const RopeTable& table, int64_t run, int first_offset,
                      const float* shift, float* rows) {
  for (int r = 0; r < count; ++r) {
    float* row = rows + r * head_dim;
    const int64_t from = head * keys.head_stride + (first_token + r) * keys.token_stride;
    for (int d = 0; d < head_dim; d += kVecLanes)
      store(row + d, load_as_float(keys.data, keys.dtype, from + d));
    if (table.half() > 0) {
      float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
      add_angles(table, run, first_offset + r, cosines, sines);
      rotate_back(row, cosines, sines, table.half());
    }
    if (shift) {
      for (int d = 0; d < head_dim; d += kVecLanes)
        store(row + d, load<F32>(row + d) - load<F32>(shift + d));
    }
  }
  for (int64_t i = int64_t{count} * head_dim; i < int64_t{kPageTokens} * head_dim; i += kVecLanes)
    store(rows + i, F32{});
}

// Columns of a transposed basis, padded so that tiles never end inside a vector.
inline int padded_rank(int rank) { return static_cast<int>(round_up(rank, kLanes)); }

// basis [rank, D] bfloat16 -> columns [D, padded_rank] float.
inline void transpose_basis(const uint16_t* basis, int rank, int head_dim, float* columns) {
  const int padded = padded_rank(rank);
  for (int d = 0; d < head_dim; ++d) {
    for (int j = 0; j < padded; ++j) {
      columns[d * padded + j] =
          j < rank ? bfloat16_to_float(basis[int64_t{j} * head_dim + d]) : 0.0f;
    }
  }
}

// latent [64, padded_rank] = rows [64, D] x columns [D, padded_rank].
inline void project_rows(const float* rows, const float* columns, int rank, int head_dim,
                         float* latent) {
  const int padded = padded_rank(rank);
  for (int j = 0; j < padded; j += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((padded - j) / kVecLanes, [&]<int kVecs>() {
      for (int t = 0; t < kPageTokens; t += kTileTokens) {
        outer_product_tile<kVecs, false>(rows + t * head_dim, head_dim, 1, columns + j, padded,
                                         head_dim, latent + t * padded + j, padded);
      }
    });
  }
}
