// The leading channels of a head, which say what a packed token is worth to a query (the select
// stage). For every page the queries are absorbed into these channels as if all its tokens stood in
// its middle; after that a token costs one integer dot product a quad of channels.

// One band of leading channels.
struct LeadBand {
  int width;
  int count;       // channels of the lines that are read; those past `used` get weight 0
  int used;        // leading channels in it
  int lane;        // where their weights begin
  int channel;     // row of the first in the head's basis
  bool core;       // coded before RoPE
  int64_t bytes;   // of the lines
  int64_t offset;  // of the lines in the head's part of a key page
};

// Bands of leading channels of one head, and the lane of what multiplies no code.
struct LeadBands {
  static constexpr int kMost = 2 * kNumWidths;
  // Channels, each band rounded up to whole lines, and the constant.
  static constexpr int kMostLanes = kMaxSelectChannels + 8 + kLanes;

  LeadBand band[kMost];
  int bands = 0;
  int constant_lane = 0;

  // Lanes in use, as whole lines of floats.
  int lanes() const { return static_cast<int>(round_up(constant_lane + 1, kLanes)); }
};

inline LeadBands lead_bands(const HeadPlan& head, int channels) {
  LeadBands lead;
  int channel = 0;
  int64_t offset = 0;
  for (const bool core : {true, false}) {
    const Bands& bands = core ? head.core : head.tail;
    for (int w = 0; w < kNumWidths; ++w) {
      const int used = std::min(bands.count[w], channels - channel);
      if (used > 0) {
        const int count = static_cast<int>(round_up(used, band_granularity(kWidths[w])));
        lead.band[lead.bands++] = {kWidths[w],
                                   count,
                                   used,
                                   lead.constant_lane,
                                   channel,
                                   core,
                                   int64_t{count} * kPageTokens * kWidths[w] / 8,
                                   offset};
        lead.constant_lane += count;
        channel += used;
      }
      offset += int64_t{bands.count[w]} * kPageTokens * kWidths[w] / 8;
    }
  }
  return lead;
}

// Numbers of the queries of one head from which a page's weights follow: for row r and lane l,
//   weight = fixed[r][l] + sum over slow pairs i of cos_i turn[r][i][0][l] + sin_i turn[r][i][1][l],
// with the angle by which the middle of the page turns pair i. [rows, lanes] and [rows, slow pairs,
// 2, lanes]. Weights are in units of their band's step, so that rounding makes them int8; the
// constant lane is in units of log2.
struct LeadQuery {
  float* fixed;
  float* turn;
  float* step;  // [rows, LeadBands::kMost]
};

// RoPE pairs slow enough to count, the faster ones first.
struct SlowPairs {
  int pair[kMaxHeadDim / 2];
  int count = 0;
  int quick = 0;  // of them, those that are not smooth over a run of pages
};

// What smooth pairs add to a page's weights is interpolated between four pages of a run of 16: at
// the frequencies that this is for, a page turns a pair by 1/16 at most, so a cubic through them is
// off by 5^4 / 24 of the fourth power of that, 4e-4 of the pair's part.
inline constexpr int kRunPages = 16;
inline constexpr int kNodes = 4;
inline constexpr int kNodeStep = 5;
inline constexpr float kSmoothFrequency = 1.0f / (16 * kPageTokens);
static_assert(kRunPages == (kNodes - 1) * kNodeStep + 1);

// Weight of node k at page `page` of the run (Lagrange).
constexpr float node_weight(int k, int page) {
  float weight = 1.0f;
  for (int j = 0; j < kNodes; ++j) {
    if (j != k)
      weight *= static_cast<float>(page - j * kNodeStep) / static_cast<float>((k - j) * kNodeStep);
  }
  return weight;
}

struct NodeWeights {
  float of[kRunPages][kNodes];
  constexpr NodeWeights() : of{} {
    for (int page = 0; page < kRunPages; ++page) {
      for (int k = 0; k < kNodes; ++k) of[page][k] = node_weight(k, page);
    }
  }
};
inline constexpr NodeWeights kNodeWeights;

// Adds a row vector x [D] (a basis row times its scale, or the mean) that meets query q [D].
inline void add_fixed(const LeadQuery& lead, int lanes, int row, int lane, const float* q,
                      const float* x, int begin, int end) {
  float sum = 0;
  for (int d = begin; d < end; ++d) sum += q[d] * x[d];
  lead.fixed[row * lanes + lane] += sum;
}
inline void add_turned(const LeadQuery& lead, const SlowPairs& slow, int half, int lanes, int row,
                       int lane, const float* q, const float* x) {
  for (int i = 0; i < slow.count; ++i) {
    const int a = slow.pair[i], b = a + half;
    float* turn = lead.turn + (int64_t{row} * slow.count + i) * 2 * lanes + lane;
    turn[0] = q[a] * x[a] + q[b] * x[b];
    turn[lanes] = q[b] * x[a] - q[a] * x[b];
  }
}

// Turns the numbers of one row, which are in units of log2, into units of steps that no page's
// weights can exceed 127 of, and takes from the constant what the mid codes would add.
inline void scale_lead(const LeadBands& lead, const LeadQuery& query, int row, int pairs) {
  const int lanes = lead.lanes();
  float* fixed = query.fixed + row * lanes;
  float* turn = query.turn + int64_t{row} * pairs * 2 * lanes;
  const auto for_each_vector = [&](const auto& fn) {
    fn(fixed);
    for (int i = 0; i < 2 * pairs; ++i) fn(turn + i * lanes);
  };
  for (int i = 0; i < lead.bands; ++i) {
    const LeadBand& band = lead.band[i];
    float largest = 0;
    for (int l = band.lane; l < band.lane + band.used; ++l) {
      float bound = std::fabs(fixed[l]);
      for (int k = 0; k < pairs; ++k)
        bound += std::hypot(turn[2 * k * lanes + l], turn[(2 * k + 1) * lanes + l]);
      largest = std::max(largest, bound);
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    const float mid = static_cast<float>((1 << band.width) - 1) / 2;
    query.step[row * LeadBands::kMost + i] = largest / 127.0f;
    for_each_vector([&](float* x) {
      for (int l = band.lane; l < band.lane + band.used; ++l) {
        x[lead.constant_lane] -= mid * x[l];
        x[l] *= inverse;
      }
    });
  }
}

// What one page's tokens are scored with: int8 weights by lane, the constant.
struct LeadWeights {
  alignas(kLineBytes) int8_t codes[kMaxRows][LeadBands::kMostLanes];
  float constant[kMaxRows];
};

// Weights of kRows rows before they are rounded.
template <int kRows>
struct RawWeights {
  alignas(kLineBytes) float of[kRows][LeadBands::kMostLanes];
};

template <int kRows>
inline void start_weights(const LeadQuery& query, int lanes, int row, RawWeights<kRows>& weights) {
  for (int r = 0; r < kRows; ++r)
    std::memcpy(weights.of[r], query.fixed + (row + r) * lanes, sizeof(float) * lanes);
}

// Adds the pairs begin .. end - 1 for the page whose middle turns all pairs by `angles` [2, pairs].
template <int kRows>
inline void absorb_pairs(const LeadQuery& query, int lanes, int row, int pairs, int begin, int end,
                         const float* angles, RawWeights<kRows>& weights) {
  for (int l = 0; l < lanes; l += kVecLanes) {
    F32 sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = load<F32>(weights.of[r] + l);
    for (int i = begin; i < end; ++i) {
      const F32 c = splat(angles[i]), s = splat(angles[pairs + i]);
      for (int r = 0; r < kRows; ++r) {
        const float* turn = query.turn + (int64_t{row + r} * pairs + i) * 2 * lanes + l;
        sum[r] += c * load<F32>(turn);
        sum[r] += s * load<F32>(turn + lanes);
      }
    }
    for (int r = 0; r < kRows; ++r) store(weights.of[r] + l, sum[r]);
  }
}

// Weights at page `page` of a run from those at its nodes.
template <int kRows>
inline void interpolate(const RawWeights<kRows> (&nodes)[kNodes], int lanes, int page,
                        RawWeights<kRows>& weights) {
  const float* of = kNodeWeights.of[page];
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < lanes; l += kVecLanes) {
      F32 sum{};
      for (int k = 0; k < kNodes; ++k) sum += load<F32>(nodes[k].of[r] + l) * of[k];
      store(weights.of[r] + l, sum);
    }
  }
}

template <int kRows>
inline void round_weights(const LeadBands& lead, const RawWeights<kRows>& weights,
                          LeadWeights& out) {
  for (int r = 0; r < kRows; ++r) {
    for (int l = 0; l < lead.lanes(); l += kVecLanes) {
      const I32 codes = round_to_int(load<F32>(weights.of[r] + l));
      store_low_bytes(reinterpret_cast<uint8_t*>(out.codes[r]) + l, codes);
    }
    out.constant[r] = weights.of[r][lead.constant_lane];
  }
}

// s[r][64], in units of log2.
template <int kWidth, int kRows>
inline void add_lead_band(const uint8_t* lines, const LeadBand& band, const LeadWeights& weights,
                          const float* step, int part, F32 (&s)[kRows][kGroups]) {
  I32 acc[kRows][kGroups];
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) acc[r][g] = I32{};
  }
  accumulate_band<kWidth, false>(lines + band.offset, band.count, weights.codes[0] + band.lane,
                                 LeadBands::kMostLanes, part, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) s[r][g] += to_float(acc[r][g]) * step[r * LeadBands::kMost];
  }
}

template <int kRows>
inline void lead_scores(const uint8_t* lines, const LeadBands& lead, const LeadWeights& weights,
                        const float* step, int part, F32 (&s)[kRows][kGroups]) {
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < kGroups; ++g) s[r][g] = splat(weights.constant[r]);
  }
  for (int i = 0; i < lead.bands; ++i) {
    const LeadBand& band = lead.band[i];
    if (band.width == 8) add_lead_band<8>(lines, band, weights, step + i, part, s);
    if (band.width == 4) add_lead_band<4>(lines, band, weights, step + i, part, s);
    if (band.width == 2) add_lead_band<2>(lines, band, weights, step + i, part, s);
    if (band.width == 1) add_lead_band<1>(lines, band, weights, step + i, part, s);
  }
}
