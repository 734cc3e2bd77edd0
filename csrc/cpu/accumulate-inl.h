// Online softmax over blocks of 64 tokens, and the products of probabilities and values.

// Softmax state of one query row, in memory: maximum (log2 units), sum, output. Probabilities are
// relative to `max`.
struct RowState {
  float max;
  float sum[kVecLanes];  // by lane
};

// State of a block of up to kMaxRows rows.
struct RowBlock {
  RowState* state;  // [rows]
  float* zero_sum;  // [rows, v_groups, kVecLanes]: probabilities times value zero points
  float* out;       // [rows, D]
};

// Probabilities of one row and block, and what the value product needs of them.
struct Probabilities {
  float p[kPageTokens];
  float largest;  // upper bound
};

inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();

inline void reset_rows(const RowBlock& rows, int count, int head_dim, int v_groups) {
  for (int r = 0; r < count; ++r) {
    rows.state[r].max = kNoScore;
    for (int i = 0; i < kVecLanes; ++i) rows.state[r].sum[i] = 0;
  }
  std::memset(rows.zero_sum, 0, sizeof(float) * count * v_groups * kVecLanes);
  std::memset(rows.out, 0, sizeof(float) * count * head_dim);
}

inline void rescale_row(const RowBlock& rows, int r, float factor, int head_dim, int v_groups) {
  store(rows.state[r].sum, load<F32>(rows.state[r].sum) * factor);
  for (int g = 0; g < v_groups; ++g) {
    float* at = rows.zero_sum + (r * v_groups + g) * kVecLanes;
    store(at, load<F32>(at) * factor);
  }
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(rows.out + r * head_dim + d, load<F32>(rows.out + r * head_dim + d) * factor);
}

// Turns the scores s[64] of row r into probabilities; tokens outside `mask` get exactly 0. Returns
// false if none is left.
inline bool softmax_row(const RowBlock& rows, int r, const float* s, uint64_t mask, int head_dim,
                        int v_groups, Probabilities& out) {
  constexpr uint32_t kAllLanes = static_cast<uint32_t>((uint64_t{1} << kVecLanes) - 1);
  const bool all = mask == ~uint64_t{0};
  F32 most = splat(kNoScore);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const uint32_t lanes = static_cast<uint32_t>(mask >> t) & kAllLanes;
    const F32 v = load<F32>(s + t);
    most = max(most, all ? v : select_lanes(lanes, v, splat(kNoScore)));
  }
  const float block_max = reduce_max(most);
  if (block_max == kNoScore) return false;

  RowState& state = rows.state[r];
  if (block_max > state.max) {
    if (state.max != kNoScore)
      rescale_row(rows, r, std::exp2(state.max - block_max), head_dim, v_groups);
    state.max = block_max;
  }
  F32 sum = load<F32>(state.sum);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const uint32_t lanes = static_cast<uint32_t>(mask >> t) & kAllLanes;
    F32 p = exp2(load<F32>(s + t) - state.max);
    if (!all) p = select_lanes(lanes, p, F32{});
    sum += p;
    store(out.p + t, p);
  }
  store(state.sum, sum);
  out.largest = exp2(splat(block_max - state.max))[0];
  return true;
}

// Probabilities times value scales of one row and group in 16 bits, as two planes of unsigned bytes
// that dot multiplies with the codes; `step` turns the integer sum back.
struct WeightCodes {
  uint8_t high[kPageTokens];
  uint8_t low[kPageTokens];
  float step;
};

// Scales and zero points of one group and page as floats; masked tokens, whose bytes may be
// anything, as zeros.
struct ValueScales {
  float scale[kPageTokens];
  float zero[kPageTokens];
  float largest;
};

inline void load_value_scales(const ValueLayout& value, const uint8_t* page, int group,
                              uint64_t mask, ValueScales& out) {
  const uint16_t* scales =
      reinterpret_cast<const uint16_t*>(page + value.scale_offset()) + group * kPageTokens;
  const uint16_t* zeros =
      reinterpret_cast<const uint16_t*>(page + value.zero_offset()) + group * kPageTokens;
  F32 largest{};
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    F32 scale = load_half(scales + t), zero = load_half(zeros + t);
    if (mask != ~uint64_t{0}) {
      const uint32_t lanes = static_cast<uint32_t>(mask >> t);
      scale = select_lanes(lanes, scale, F32{});
      zero = select_lanes(lanes, zero, F32{});
    }
    largest = max(largest, scale);
    store(out.scale + t, scale);
    store(out.zero + t, zero);
  }
  out.largest = reduce_max(largest);
}

inline void quantize_probabilities(const Probabilities& probabilities, const ValueScales& scales,
                                   float* zero_sum, WeightCodes& out) {
  constexpr float kTop = 65535.0f;
  const float bound = probabilities.largest * scales.largest;
  out.step = bound / kTop;
  const F32 inverse = splat(bound > 0 ? kTop / bound : 0.0f);
  F32 zeros = load<F32>(zero_sum);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 p = load<F32>(probabilities.p + t);
    zeros += p * load<F32>(scales.zero + t);
    const I32 code = round_to_int(min(p * load<F32>(scales.scale + t) * inverse, splat(kTop)));
    store_low_bytes(out.high + t, code >> 8);
    store_low_bytes(out.low + t, code);
  }
  store(zero_sum, zeros);
}

// out[r][channels of kBlocks blocks] += probabilities . values of one page; all blocks lie in one
// value group.
template <int kWidth, int kRows, int kBlocks>
inline void accumulate_blocks(const uint8_t* lines, const WeightCodes* weights,
                              int64_t weight_stride, int head_dim, float* out) {
  constexpr int kUnits = 8 / kWidth;
  constexpr int kBlockLines = kTokenQuads / kUnits;
  for (int part = 0; part < kParts; ++part) {
    I32 high[kRows][kBlocks], low[kRows][kBlocks];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) high[r][b] = low[r][b] = I32{};
    }
    for (int line = 0; line < kBlockLines; ++line) {
      U32 bits[kBlocks];
      for (int b = 0; b < kBlocks; ++b) {
        bits[b] = load<U32>(lines + (b * kBlockLines + line) * kLineBytes + part * kVecBytes);
      }
      for (int k = 0; k < kUnits; ++k) {
        const int token = (line * kUnits + k) * kQuad;
        U32 codes[kBlocks];
        for (int b = 0; b < kBlocks; ++b) codes[b] = unit_codes<kWidth>(bits[b], k);
        for (int r = 0; r < kRows; ++r) {
          const U32 h = splat_quad(weights[r * weight_stride].high + token);
          const U32 l = splat_quad(weights[r * weight_stride].low + token);
          for (int b = 0; b < kBlocks; ++b) {
            high[r][b] = dot(high[r][b], h, codes[b]);
            low[r][b] = dot(low[r][b], l, codes[b]);
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = out + r * head_dim + b * kLanes + part * kVecLanes;
        store(at, load<F32>(at) +
                      to_float((high[r][b] << 8) + low[r][b]) * weights[r * weight_stride].step);
      }
    }
  }
}

// Bytes that a later page will need, asked for a few lines at a time: pages of one head lie too far
// apart for the processor to guess them, and all at once would fill its miss buffers.
struct Prefetcher {
  const uint8_t* at;
  const uint8_t* end;

  void fetch(int lines) {
    for (; lines > 0 && at < end; --lines, at += kLineBytes) __builtin_prefetch(at);
  }
};

// Asks for a line in the second cache: what is asked for far ahead would fill the first.
inline void prefetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// out[r] += probabilities . packed values; weights are [kRows, v_groups].
template <int kWidth, int kRows>
inline void accumulate_packed(const ValueLayout& value, const uint8_t* page,
                              const WeightCodes* weights, Prefetcher& next, float* out) {
  const uint8_t* lines = page + value.code_offset();
  constexpr int kBlockBytes = kTokenQuads * kWidth / 8 * kLineBytes;
  const int blocks = value.head_dim / kLanes, group_blocks = value.group_size / kLanes,
            groups = value.groups();
  for (int block = 0; block < blocks;) {
    const WeightCodes* group_weights = weights + block / group_blocks;
    next.fetch(2 * kBlockBytes / kLineBytes);
    if (block + 1 < blocks && block / group_blocks == (block + 1) / group_blocks) {
      accumulate_blocks<kWidth, kRows, 2>(lines + int64_t{block} * kBlockBytes, group_weights,
                                          groups, value.head_dim, out + block * kLanes);
      block += 2;
    } else {
      accumulate_blocks<kWidth, kRows, 1>(lines + int64_t{block} * kBlockBytes, group_weights,
                                          groups, value.head_dim, out + block * kLanes);
      block += 1;
    }
  }
}

// out[r] += probabilities . exact values in rows; tokens outside the mask are not read.
template <int kRows>
inline void accumulate_exact(const Probabilities* probabilities, const void* values, DataType dtype,
                             int64_t first, uint64_t mask, int head_dim, float* out) {
  constexpr int kChunk = 2;  // vectors of a row held while its tokens go by
  for (int d = 0; d < head_dim; d += kChunk * kVecLanes) {
    const int vecs = std::min(kChunk, (head_dim - d) / kVecLanes);
    F32 acc[kRows][kChunk];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) acc[r][v] = load<F32>(out + r * head_dim + d + v * kVecLanes);
    }
    for (uint64_t rest = mask; rest; rest &= rest - 1) {
      const int t = __builtin_ctzll(rest);
      for (int v = 0; v < vecs; ++v) {
        const F32 value =
            load_as_float(values, dtype, first + int64_t{t} * head_dim + d + v * kVecLanes);
        for (int r = 0; r < kRows; ++r) acc[r][v] += value * probabilities[r].p[t];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) store(out + r * head_dim + d + v * kVecLanes, acc[r][v]);
    }
  }
}
