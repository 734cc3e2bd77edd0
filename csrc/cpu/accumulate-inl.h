// Online softmax over blocks of 64 tokens, and the products of probabilities and values.

// Softmax state of one query row, in memory: maximum (log2 units), sum, output. Probabilities are
// relative to `max`.
struct RowState {
  float max;
  float sum[kVecLanes];  // by lane
};

// State of a block of up to kMaxRows rows.
struct RowBlock {
  RowState* state;    // [rows]
  float* middle_sum;  // [rows, v_groups, kVecLanes]: what all channels of a group get alike
  float* out;         // [rows, D]: the rest
};

// Bits of `mask` of the tokens of a vector, t and on.
inline uint32_t mask_lanes(uint64_t mask, int t) {
  return static_cast<uint32_t>(mask >> t) & static_cast<uint32_t>((uint64_t{1} << kVecLanes) - 1);
}

inline constexpr float kNoScore = -std::numeric_limits<float>::infinity();

inline void reset_rows(const RowBlock& rows, int count, int head_dim, int v_groups) {
  for (int r = 0; r < count; ++r) {
    rows.state[r].max = kNoScore;
    for (int i = 0; i < kVecLanes; ++i) rows.state[r].sum[i] = 0;
  }
  std::memset(rows.middle_sum, 0, sizeof(float) * count * v_groups * kVecLanes);
  std::memset(rows.out, 0, sizeof(float) * count * head_dim);
}

inline void rescale_row(const RowBlock& rows, int r, float factor, int head_dim, int v_groups) {
  store(rows.state[r].sum, load<F32>(rows.state[r].sum) * factor);
  for (int g = 0; g < v_groups; ++g) {
    float* at = rows.middle_sum + (r * v_groups + g) * kVecLanes;
    store(at, load<F32>(at) * factor);
  }
  for (int d = 0; d < head_dim; d += kVecLanes)
    store(rows.out + r * head_dim + d, load<F32>(rows.out + r * head_dim + d) * factor);
}

// Scores s[64] of row r will be looked at relative to the returned maximum, that of all tokens so far:
// raises the row's to theirs. Tokens outside `mask` do not count. kNoScore if none is left.
inline float raise_max(const RowBlock& rows, int r, const float* s, uint64_t mask, int head_dim,
                       int v_groups) {
  F32 most = splat(kNoScore);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 v = load<F32>(s + t);
    most = max(most, mask == ~uint64_t{0} ? v : select_lanes(mask_lanes(mask, t), v, most));
  }
  const float block_max = reduce_max(most);
  RowState& state = rows.state[r];
  if (block_max > state.max) {
    if (state.max != kNoScore)
      rescale_row(rows, r, std::exp2(state.max - block_max), head_dim, v_groups);
    state.max = block_max;
  }
  return block_max;
}

// Probabilities of tokens t .. t + kVecLanes - 1 from their scores; those outside `mask` get 0.
inline F32 probabilities_at(const float* s, int t, float max, uint64_t mask) {
  const F32 p = exp2(load<F32>(s + t) - max);
  return mask == ~uint64_t{0} ? p : select_lanes(mask_lanes(mask, t), p, F32{});
}

// Turns the scores s[64] of row r into probabilities p[64]; returns false if no token is in `mask`.
inline bool softmax_row(const RowBlock& rows, int r, const float* s, uint64_t mask, int head_dim,
                        int v_groups, float* p) {
  if (raise_max(rows, r, s, mask, head_dim, v_groups) == kNoScore) return false;
  RowState& state = rows.state[r];
  F32 sum = load<F32>(state.sum);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 v = probabilities_at(s, t, state.max, mask);
    sum += v;
    store(p + t, v);
  }
  store(state.sum, sum);
  return true;
}

// Scales of one group and page, and what their tokens' values are where a code is in the middle;
// masked tokens, whose bytes may be anything, as zeros.
struct ValueScales {
  float scale[kPageTokens];
  float middle[kPageTokens];
  float largest;  // scale
};

inline void load_value_scales(const ValueLayout& value, const uint8_t* page, int group,
                              uint64_t mask, ValueScales& out) {
  const uint16_t* scales =
      reinterpret_cast<const uint16_t*>(page + value.scale_offset()) + group * kPageTokens;
  const uint16_t* zeros =
      reinterpret_cast<const uint16_t*>(page + value.zero_offset()) + group * kPageTokens;
  F32 largest{};
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    F32 scale = load_half(scales + t), middle = load_half(zeros + t) + scale * mid_code(value.bits);
    if (mask != ~uint64_t{0}) {
      scale = select_lanes(mask_lanes(mask, t), scale, F32{});
      middle = select_lanes(mask_lanes(mask, t), middle, F32{});
    }
    largest = max(largest, scale);
    store(out.scale + t, scale);
    store(out.middle + t, middle);
  }
  out.largest = reduce_max(largest);
}

// Probabilities times value scales of one row and group as bytes that dot multiplies with the codes;
// `step` turns the integer sum back.
struct WeightCodes {
  uint8_t code[kPageTokens];
  float step;
};

// What is added before a weight is cut to a whole number: every fraction from 1/128 on, so that over
// a page small weights are lost as often as they are raised to a step, and nothing on average.
struct Dither {
  alignas(kLineBytes) float of[kPageTokens];
  constexpr Dither() : of{} {
    for (int t = 0; t < kPageTokens; ++t) {
      int reversed = 0;
      for (int bit = 0; bit < 6; ++bit) reversed |= (t >> bit & 1) << (5 - bit);
      of[t] = (static_cast<float>(reversed) + 0.5f) / kPageTokens;
    }
  }
};
inline constexpr Dither kDither;

// Turns the scores s[64] of row r into the weights of every group, [groups]; what they multiply are
// codes less the middle one. Rounding them adds a variance of at most step^2 / 4 times (code -
// mid)^2, where rounding the values to codes cost weight^2 step^2 / 12: a few per cent of that where
// one token has all the weight of a page, and less elsewhere.
// Weights are 0 if no token is in `mask`.
inline void weigh_row(const RowBlock& rows, int r, const float* s, uint64_t mask,
                      const ValueLayout& value, const ValueScales* scales, WeightCodes* out) {
  constexpr float kTop = 255.0f;
  const int groups = value.groups();
  const float block_max = raise_max(rows, r, s, mask, value.head_dim, groups);
  if (block_max == kNoScore) {
    std::memset(out, 0, sizeof(WeightCodes) * groups);
    return;
  }
  RowState& state = rows.state[r];
  F32 p[kPageTokens / kVecLanes], sum = load<F32>(state.sum);
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    p[t / kVecLanes] = probabilities_at(s, t, state.max, mask);
    sum += p[t / kVecLanes];
  }
  store(state.sum, sum);
  const float largest = exp2(splat(block_max - state.max))[0];
  for (int g = 0; g < groups; ++g) {
    const float bound = largest * scales[g].largest;
    out[g].step = bound / kTop;
    const F32 inverse = splat(bound > 0 ? kTop / bound : 0.0f);
    F32 middles{};
    I32 total{};
    for (int first = 0; first < kPageTokens; first += 4 * kVecLanes) {
      I32 code[4];
      for (int i = 0; i < 4; ++i) {
        const int t = first + i * kVecLanes;
        const F32 v = p[t / kVecLanes];
        middles += v * load<F32>(scales[g].middle + t);
        code[i] =
            cut_to_int(v * load<F32>(scales[g].scale + t) * inverse + load<F32>(kDither.of + t));
        total += code[i];
      }
      store_bytes(out[g].code + first, code);
    }
    float* at = rows.middle_sum + (r * groups + g) * kVecLanes;
    const float less = out[g].step * mid_code(value.bits);
    store(at, load<F32>(at) + (middles - to_float(total) * less));
  }
}

// Bytes that the next page will need, keys and then values, asked for a few lines at a time all along
// this page: pages lie too far apart for the processor to guess them, and all at once would fill its
// miss buffers and wait.
struct Prefetcher {
  struct Range {
    const uint8_t* at;
    const uint8_t* end;
  };
  Range now, then;

  void fetch(int lines) {
    for (; lines > 0; --lines, now.at += kLineBytes) {
      if (now.at >= now.end) {
        now = then;
        then = {};
        if (now.at >= now.end) return;
      }
      __builtin_prefetch(now.at);
    }
  }
};

// out[r][channels of kBlocks blocks] += weights . (value codes - mid) of one page; all blocks lie in one
// value group.
template <int kWidth, int kRows, int kBlocks>
inline void accumulate_blocks(const uint8_t* lines, const WeightCodes* weights,
                              int64_t weight_stride, int head_dim, Prefetcher& next, float* out) {
  constexpr int kUnits = 8 / kWidth;
  constexpr int kBlockLines = kTokenQuads / kUnits;
  for (int part = 0; part < kParts; ++part) {
    I32 acc[kRows][kBlocks];
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) acc[r][b] = I32{};
    }
    for (int line = 0; line < kBlockLines; ++line) {
      U32 bits[kBlocks];
      if (part == 0) next.fetch(kBlocks);  // as many as are read
      for (int b = 0; b < kBlocks; ++b) {
        bits[b] = load<U32>(lines + (b * kBlockLines + line) * kLineBytes + part * kVecBytes);
      }
      for (int k = 0; k < kUnits; ++k) {
        U32 codes[kBlocks];
        for (int b = 0; b < kBlocks; ++b) codes[b] = unit_codes<kWidth>(bits[b], k);
        for (int r = 0; r < kRows; ++r) {
          const U32 quad =
              splat_quad(weights[r * weight_stride].code + (line * kUnits + k) * kQuad);
          for (int b = 0; b < kBlocks; ++b) acc[r][b] = dot(acc[r][b], quad, codes[b]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        float* at = out + r * head_dim + b * kLanes + part * kVecLanes;
        store(at, load<F32>(at) + to_float(acc[r][b]) * weights[r * weight_stride].step);
      }
    }
  }
}

// Asks for a line in the second cache: what is asked for far ahead would fill the first.
inline void prefetch_line(const uint8_t* at) { __builtin_prefetch(at, 0, 2); }

// out[r] += probabilities . packed values; weights are [kRows, v_groups].
template <int kWidth, int kRows>
inline void accumulate_packed(const ValueLayout& value, const uint8_t* page,
                              const WeightCodes* weights, Prefetcher& next, float* out) {
  const uint8_t* lines = page + value.code_offset();
  constexpr int kBlockBytes = kTokenQuads * kWidth / 8 * kLineBytes;
  constexpr int kMostBlocks = 4;
  const int group_blocks = value.group_size / kLanes;
  for (int group = 0; group < value.groups(); ++group) {
    for (int first = 0; first < group_blocks; first += kMostBlocks) {
      const int block = group * group_blocks + first;
      with_count<kMostBlocks>(group_blocks - first, [&]<int kBlocks>() {
        accumulate_blocks<kWidth, kRows, kBlocks>(lines + int64_t{block} * kBlockBytes,
                                                  weights + group, value.groups(), value.head_dim,
                                                  next, out + block * kLanes);
      });
    }
  }
}

// out[r] += probabilities . exact values in rows; tokens outside the mask are not read.
template <int kRows>
inline void accumulate_exact(const float (*probabilities)[kPageTokens], const void* values,
                             DataType dtype, int64_t first, uint64_t mask, int head_dim,
                             float* out) {
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
        for (int r = 0; r < kRows; ++r) acc[r][v] += value * probabilities[r][t];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < vecs; ++v) store(out + r * head_dim + d + v * kVecLanes, acc[r][v]);
    }
  }
}
