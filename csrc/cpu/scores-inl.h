// Scores of one block of 64 tokens, in units of log2: codes absorbed into the query (tail
// channels), keys reconstructed from codes and rotated (core channels), and exact keys. All write
// s[row][64]; those of tail channels may be added to those of core channels.

// Rows of weights, quantized to be multiplied with the codes of one head. A band's codes are
// multiplied with int8 numbers of one step per band, q'_j ~ step * high_j; 8-bit codes are up to 17
// times larger than 4-bit ones, so their band adds a second term, step / 254 * low_j.
struct QueryCodes {
  const int8_t* high;  // [rank] of the first row; rows follow at `stride`
  const int8_t* low;
  const float* step;    // [rows, kNumWidths]
  const float* offset;  // [rows]: q . mean less the mid codes' share
  int64_t stride;
};

inline constexpr float kLowSteps = 254.0f;

// Quantizes weights [rank] of one band to int8 and returns the step; low may be null.
inline float quantize_weights(const float* weights, int count, int8_t* high, int8_t* low) {
  float largest = 0;
  for (int j = 0; j < count; ++j) largest = std::max(largest, std::fabs(weights[j]));
  const float step = largest / 127.0f;
  const float inverse = step > 0 ? 1.0f / step : 0.0f;
  for (int j = 0; j < count; ++j) {
    const float whole = std::nearbyintf(weights[j] * inverse);
    high[j] = static_cast<int8_t>(whole);
    if (low) {
      const float rest = std::nearbyintf((weights[j] * inverse - whole) * kLowSteps);
      low[j] = static_cast<int8_t>(std::min(std::max(rest, -127.0f), 127.0f));
    }
  }
  return step;
}

// Codes of unit k of a line.
template <int kWidth>
inline U32 unit_codes(U32 line, int k) {
  constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
  return kWidth == 8 ? line : (line >> (k * kWidth)) & kMask;
}

template <int kWidth>
inline I32 dot_codes(I32 acc, U32 codes, U32 weights) {
  return kWidth == 8 ? dot_wide(acc, codes, weights) : dot(acc, codes, weights);
}

// Bytes of the lines of one band: as stored, or unpacked to a byte a code.
template <int kWidth, bool kUnpacked>
inline int64_t band_bytes(int count) {
  return int64_t{count} * kPageTokens * (kUnpacked ? 8 : kWidth) / 8;
}

// acc[row][group] += codes . weights over one band, for the lanes of one part.
template <int kWidth, bool kUnpacked, int kRows>
inline void accumulate_band(const uint8_t* lines, int count, const int8_t* weights, int64_t stride,
                            int part, I32 (&acc)[kRows][kGroups]) {
  constexpr int kUnits = kUnpacked ? 1 : 8 / kWidth;               // units in a line
  constexpr int kStepUnits = kUnits > kGroups ? kUnits : kGroups;  // whole lines and whole quads
  const uint8_t* line = lines + part * kVecBytes;
  for (int channel = 0; channel < count; channel += kStepUnits / kGroups * kQuad) {
    for (int l = 0; l < kStepUnits / kUnits; ++l, line += kLineBytes) {
      const U32 bits = load<U32>(line);
      for (int k = 0; k < kUnits; ++k) {
        const int unit = l * kUnits + k;
        const U32 codes = kUnpacked ? bits : unit_codes<kWidth>(bits, k);
        for (int r = 0; r < kRows; ++r) {
          const U32 quad = splat_quad(weights + r * stride + channel + unit / kGroups * kQuad);
          acc[r][unit % kGroups] = dot_codes<kWidth>(acc[r][unit % kGroups], codes, quad);
        }
      }
    }
  }
}

// s[r] (+)= codes . weights over one band; the first one starts from the offsets, which kAdd adds to
// the scores that are there.
template <int kWidth, bool kUnpacked, int kRows, bool kAdd>
inline void add_band_scores(const uint8_t* lines, int count, const QueryCodes& query, int channel,
                            int row, int band, bool first, float* s) {
  for (int part = 0; part < kParts; ++part) {
    for (int term = 0; term < (kWidth == 8 ? 2 : 1); ++term) {
      I32 acc[kRows][kGroups];
      for (int r = 0; r < kRows; ++r) {
        for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
      }
      accumulate_band<kWidth, kUnpacked>(
          lines, count, (term ? query.low : query.high) + row * query.stride + channel,
          query.stride, part, acc);
      for (int r = 0; r < kRows; ++r) {
        const float step = query.step[(row + r) * kNumWidths + band] / (term ? kLowSteps : 1.0f);
        for (int g = 0; g < kGroups; ++g) {
          float* at = s + r * kPageTokens + g * kLanes + part * kVecLanes;
          const F32 offset = splat(first && term == 0 ? query.offset[row + r] : 0.0f);
          const F32 before = kAdd                 ? load<F32>(at) + offset
                             : first && term == 0 ? offset
                                                  : load<F32>(at);
          store(at, before + to_float(acc[r][g]) * step);
        }
      }
    }
  }
}

// s[r] (kAdd: +)= offset + sum over the channels of `bands`, for rows row .. row + kRows - 1.
template <bool kUnpacked, int kRows, bool kAdd = false>
inline void code_scores(const uint8_t* lines, const Bands& bands, const QueryCodes& query, int row,
                        float* s) {
  int channel = 0;
  for_each_band(bands, [&]<int kWidth>(int count, int band) {
    add_band_scores<kWidth, kUnpacked, kRows, kAdd>(lines, count, query, channel, row, band,
                                                    channel == 0, s);
    channel += count;
    lines += band_bytes<kWidth, kUnpacked>(count);
  });
  if (channel > 0) return;
  for (int r = 0; r < kRows; ++r) {
    const F32 offset = splat(query.offset[row + r]);
    for (int t = 0; t < kPageTokens; t += kVecLanes) {
      float* at = s + r * kPageTokens + t;
      store(at, kAdd ? load<F32>(at) + offset : offset);
    }
  }
}

// Spreads the codes of one band to a byte each; units stay in order.
template <int kWidth>
inline void unpack_band(const uint8_t* lines, int count, uint8_t* bytes) {
  constexpr int kUnits = 8 / kWidth;
  for (int line = 0; line < count * kGroups / kQuad / kUnits; ++line) {
    for (int part = 0; part < kParts; ++part) {
      const U32 bits = load<U32>(lines + line * kLineBytes + part * kVecBytes);
      for (int k = 0; k < kUnits; ++k) {
        store(bytes + (line * kUnits + k) * kLineBytes + part * kVecBytes,
              unit_codes<kWidth>(bits, k));
      }
    }
  }
}

// Columns of reconstructed keys lie in pair order: the two channels of a RoPE pair side by side, so
// that a tile of columns can be rotated as soon as it is made. Channel of the head in column c:
inline int pair_channel(int c, int half) { return c < 2 * half ? c % 2 * half + c / 2 : c; }

// Turns the pair (x, y) of every token forward by its offset in the page; cosines and sines are
// [64] of this pair.
inline void rotate_pair(float* x, float* y, const float* cosines, const float* sines) {
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    const F32 c = load<F32>(cosines + t), s = load<F32>(sines + t);
    const F32 a = load<F32>(x + t), b = load<F32>(y + t);
    store(x + t, a * c - b * s);
    store(y + t, b * c + a * s);
  }
}

// Keys of one page as columns [D, 64] in pair order, rotated by `turns` [half, 2, 64], the cosines
// and sines of every pair and token.
// The scaled basis of a head's core channels is quantized like a query with one row per column:
// key_c = offset_c + sum_j code_j W_cj, so reconstructing keys is scoring by another name. All rows
// read the codes, so they are unpacked once, into `bytes` [rank, 64].
inline void reconstruct_keys(const uint8_t* lines, const Bands& bands, const QueryCodes& weights,
                             int head_dim, int half, const float* turns, uint8_t* bytes,
                             float* keys) {
  static_assert(kLanes % kMaxRows == 0 && kMaxRows % 2 == 0, "a tile of columns holds whole pairs");
  uint8_t* to = bytes;
  for_each_band(bands, [&]<int kWidth>(int count, int) {
    unpack_band<kWidth>(lines, count, to);
    lines += band_bytes<kWidth, false>(count);
    to += band_bytes<kWidth, true>(count);
  });
  for (int c = 0; c < head_dim; c += kMaxRows) {
    code_scores<true, kMaxRows>(bytes, bands, weights, c, keys + c * kPageTokens);
    for (int pair = c / 2; pair < std::min((c + kMaxRows) / 2, half); ++pair) {
      const float* cosines = turns + int64_t{pair} * 2 * kPageTokens;
      rotate_pair(keys + 2 * pair * kPageTokens, keys + (2 * pair + 1) * kPageTokens, cosines,
                  cosines + kPageTokens);
    }
  }
}

// s[r][t] = query[r] . key_t with keys as columns [D, 64] in pair order.
template <int kRows>
inline void column_scores(const float* query, int head_dim, int half, const float* keys, float* s) {
  for (int part = 0; part < kParts; ++part) {
    F32 acc[kRows][kGroups];
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g) acc[r][g] = F32{};
    }
    for (int c = 0; c < head_dim; ++c) {
      const float* channel = query + pair_channel(c, half);
      F32 weight[kRows];
      for (int r = 0; r < kRows; ++r) weight[r] = splat(channel[r * head_dim]);
      for (int g = 0; g < kGroups; ++g) {
        const F32 key = load<F32>(keys + c * kPageTokens + g * kLanes + part * kVecLanes);
        for (int r = 0; r < kRows; ++r) acc[r][g] += key * weight[r];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int g = 0; g < kGroups; ++g)
        store(s + r * kPageTokens + g * kLanes + part * kVecLanes, acc[r][g]);
    }
  }
}

// s[r][0] = query[r] . key for one exact key, whose numbers begin at `at`.
template <int kRows>
inline void exact_score(const float* query, int head_dim, const void* keys, DataType dtype,
                        int64_t at, float* s) {
  F32 acc[kRows];
  for (int r = 0; r < kRows; ++r) acc[r] = F32{};
  for (int d = 0; d < head_dim; d += kVecLanes) {
    const F32 key = load_as_float(keys, dtype, at + d);
    for (int r = 0; r < kRows; ++r) acc[r] += key * load<F32>(query + r * head_dim + d);
  }
  for (int r = 0; r < kRows; ++r) s[r * kPageTokens] = reduce_add(acc[r]);
}

// s[r][t] = query[r] . key_t for `count` exact keys in rows; other tokens get 0 (and are masked by
// the caller).
template <int kRows>
inline void exact_scores(const float* query, int head_dim, const void* keys, DataType dtype,
                         int64_t first, int count, float* s) {
  for (int t = 0; t < count; ++t)
    exact_score<kRows>(query, head_dim, keys, dtype, first + int64_t{t} * head_dim, s + t);
  for (int r = 0; r < kRows; ++r) {
    for (int t = count; t < kPageTokens; ++t) s[r * kPageTokens + t] = 0;
  }
}
