// pre-RoPE channels absorbed into few queries, page by page.
//
// A key is decoded as R_t (mean + sum_j latent_j x_j), where x_j is the scaled basis row of channel j
// and R_t turns pair i by t * inv_freq[i]. With q_i and x_ij the two channels of a pair as complex
// numbers, its part of the score is Re(conj(q_i) x_ij e^(i phi)). In a page the angle phi is that of
// the page's middle plus a_i x, where x runs from -1 to 1 over the page and a_i is half the page's
// turn. For slow pairs a_i is small, and e^(i a x) is nearly a polynomial of degree 2 in x, here by
// Chebyshev's T_n and Bessel's J_n:
//   e^(i a x) = J_0(a) + 2 i J_1(a) T_1(x) - 2 J_2(a) T_2(x) + error, |error| < 2 J_3(a) + ... < a^3/23.
// So all slow pairs together are three numbers a channel and page, and a score is three integer dot
// products a token, while only the fast pairs of a key have to be reconstructed.
//
// The numbers of a page are sums over pairs of two numbers that depend on the query and the channel
// alone (`turn`) times the cosine and sine of the page's middle: 16-bit products, added in 32 bits.
// What pairs that are slower still (smooth) add is interpolated between four pages of a run of 16.
//
// Per page, D = 128, 48 channels, 4 query rows, 44 slow pairs, 30 of them smooth: about 420 vector
// operations for the 14 others, 180 for the smooth ones, 300 to round, 250 a degree to score.

inline constexpr int kDegrees = 3;
// The mean is part of every key, so its share is held to degree 4: that costs no products with codes.
inline constexpr int kConstantDegrees = 5;
// A cosine of 1, and what the parts of a weight may add up to: their products stay below 2^31.
inline constexpr float kCosineUnits = 1 << 14;
inline constexpr float kTurnUnits = 1 << 16;

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

// T_n at the tokens of a page.
struct Chebyshev {
  alignas(kLineBytes) float of[kConstantDegrees][kPageTokens];
  constexpr Chebyshev() : of{} {
    for (int t = 0; t < kPageTokens; ++t) {
      const float x = static_cast<float>(2 * t - (kPageTokens - 1)) / (kPageTokens - 1);
      of[0][t] = 1;
      of[1][t] = x;
      for (int n = 2; n < kConstantDegrees; ++n) of[n][t] = 2 * x * of[n - 1][t] - of[n - 2][t];
    }
  }
};
inline constexpr Chebyshev kChebyshev;

// The slow pairs of a rope, those with a part of degree 2 first, then the others, then smooth ones.
struct SlowPairs {
  int pair[kMaxHeadDim / 2];
  int curved = 0;  // with a part of degree 2
  int quick = 0;   // those that are not smooth
  int count = 0;
  // J_0, 2 J_1, -2 J_2, -2 J_3, 2 J_4 of half the page's turn, zeros to a whole vector.
  float factor[kConstantDegrees][kMaxHeadDim / 2 + kVecLanes] = {};
  // Cosine and sine from a page's start to its middle.
  float half_turn[2][kMaxHeadDim / 2 + kVecLanes] = {};

  bool slow(float frequency) const { return frequency <= kAbsorbedFastest; }
};

inline SlowPairs slow_pairs(const Rope& rope) {
  SlowPairs slow;
  const auto take = [&](float above, float most) {
    for (int i = 0; i < rope.rotary_pairs; ++i) {
      const float frequency = rope.inv_freq[i];
      if (!(frequency > above && frequency <= most)) continue;
      const float a = frequency * (kPageTokens - 1) / 2, b = a * a;
      slow.factor[0][slow.count] = 1 - b / 4 * (1 - b / 16 * (1 - b / 36));
      slow.factor[1][slow.count] = a * (1 - b / 8 * (1 - b / 24));
      slow.factor[2][slow.count] = -b / 4 * (1 - b / 12 * (1 - b / 32));
      slow.factor[3][slow.count] = -a * b / 24 * (1 - b / 16 * (1 - b / 40));
      slow.factor[4][slow.count] = b * b / 192 * (1 - b / 20);
      slow.half_turn[0][slow.count] = std::cos(a);
      slow.half_turn[1][slow.count] = std::sin(a);
      slow.pair[slow.count++] = i;
    }
  };
  take(kLinearFastest, kAbsorbedFastest);
  slow.curved = slow.count;
  take(kSmoothFastest, kLinearFastest);
  slow.quick = slow.count;
  take(-std::numeric_limits<float>::infinity(), kSmoothFastest);
  return slow;
}

// Angles of the middles of pages, from the first page of a run on.
struct MiddleAngles {
  float* turns;     // [pages, 2, pairs]: cosines and sines
  int32_t* halves;  // [pages, kDegrees, pairs]: two 16-bit numbers, for `turn` of a query
  int pairs;        // stride: slow pairs in whole vectors

  MiddleAngles at(int64_t page) const {
    return {turns + page * 2 * pairs, halves + page * kDegrees * pairs, pairs};
  }
};

// Sets one page, to whose start `rotation` [2, half] turns.
inline void set_middle(const SlowPairs& slow, const double* rotation, int half,
                       const MiddleAngles& page) {
  float start[2][kMaxHeadDim / 2 + kVecLanes] = {};
  for (int i = 0; i < slow.count; ++i) {
    start[0][i] = static_cast<float>(rotation[slow.pair[i]]);
    start[1][i] = static_cast<float>(rotation[half + slow.pair[i]]);
  }
  for (int i = 0; i < slow.count; i += kVecLanes) {
    const F32 a = load<F32>(slow.half_turn[0] + i), b = load<F32>(slow.half_turn[1] + i);
    const F32 c = load<F32>(start[0] + i), s = load<F32>(start[1] + i);
    const F32 cosine = c * a - s * b, sine = s * a + c * b;
    store(page.turns + i, cosine);
    store(page.turns + page.pairs + i, sine);
    const auto put = [&](int degree, F32 low, F32 high) {
      const F32 factor = load<F32>(slow.factor[degree] + i) * kCosineUnits;
      const I32 both = (round_to_int(low * factor) & 0xffff) | round_to_int(high * factor) << 16;
      store(page.halves + degree * page.pairs + i, both);
    };
    put(0, cosine, sine);
    put(1, -sine, cosine);
    put(2, cosine, sine);
  }
}

// Weights of a tile of kMaxRows query rows lie quad by quad: four channels of row 0, of row 1, ...
inline constexpr int kQuadLanes = kMaxRows * kQuad;
inline constexpr int kQuadVecs = kQuadLanes / kVecLanes;
static_assert(kQuadVecs * kVecLanes == kQuadLanes);
// In whole lines of bytes.
inline int absorbed_lanes(int rank) {
  return static_cast<int>(round_up(rank / kQuad * kQuadLanes, 4 * kVecLanes));
}
// Constants of all rows and degrees, in whole vectors.
inline constexpr int kConstantLanes =
    (kConstantDegrees * kMaxRows + kVecLanes - 1) / kVecLanes * kVecLanes;

// A tile of queries absorbed into a head's pre-RoPE channels, up to the angles of a page.
struct AbsorbedQuery {
  int32_t* turn;        // [pairs, lanes]: what cosines and sines multiply, two 16-bit numbers
  float* fixed;         // [lanes]: what does not turn, in units of products
  float* unit;          // [kMaxRows]: what one unit of products is worth, in log2 units
  float* constant;      // [1 + 2 * pairs, kConstantLanes]: the same for what multiplies no code
  const uint8_t* mids;  // [lanes]: twice the middle code
  int lanes;
  int pairs;
};

// What smooth pairs and `fixed` add to weights at the nodes of a run: [kNodes, 2, lanes].
using NodeSums = float*;

// A page's weights: [kDegrees, lanes] each; per degree and row the step, and what multiplies no code.
struct AbsorbedWeights {
  int8_t* high;
  int8_t* low;
  float* raw;
  float step[kDegrees][kMaxRows];
  float constant[kConstantDegrees][kMaxRows];
};

// acc[degree][v] += the pairs begin .. end - 1 at vectors v of `turn`, for degrees below kDegree.
template <int kDegree, int kVecs>
[[gnu::always_inline]] inline void add_pairs(const AbsorbedQuery& query, const MiddleAngles& angles,
                                             int lane, int begin, int end,
                                             I32 (&acc)[kDegrees][kVecs]) {
  for (int i = begin; i < end; ++i) {
    const int32_t* turn = query.turn + int64_t{i} * query.lanes + lane;
    I32 angle[kDegree];
    for (int d = 0; d < kDegree; ++d) angle[d] = I32{} + angles.halves[d * angles.pairs + i];
    for (int v = 0; v < kVecs; ++v) {
      const I32 both = load<I32>(turn + v * kVecLanes);
      for (int d = 0; d < kDegree; ++d) acc[d][v] = dot_halves(acc[d][v], both, angle[d]);
    }
  }
}

inline constexpr int kAbsorbVecs = SVDQ_TARGET == 512 ? 4 : 2;  // accumulators of a degree
static_assert(kAbsorbVecs % kQuadVecs == 0);

template <int kVecs>
[[gnu::always_inline]] inline void clear(I32 (&acc)[kDegrees][kVecs]) {
  for (auto& sums : acc) {
    for (I32& sum : sums) sum = I32{};
  }
}

// Sums of smooth pairs at the nodes of a run whose first page is that of `angles`.
inline void absorb_nodes(const AbsorbedQuery& query, const SlowPairs& slow,
                         const MiddleAngles& angles, NodeSums nodes) {
  for (int k = 0; k < kNodes; ++k) {
    const MiddleAngles node = angles.at(k * kNodeStep);
    float* sums = nodes + int64_t{k} * 2 * query.lanes;
    for (int lane = 0; lane < query.lanes; lane += kAbsorbVecs * kVecLanes) {
      I32 acc[kDegrees][kAbsorbVecs];
      clear(acc);
      add_pairs<2>(query, node, lane, slow.quick, slow.count, acc);
      for (int v = 0; v < kAbsorbVecs; ++v) {
        const int at = lane + v * kVecLanes;
        store(sums + at, to_float(acc[0][v]) + load<F32>(query.fixed + at));
        store(sums + query.lanes + at, to_float(acc[1][v]));
      }
    }
  }
}

// Constants of a page, without the middle codes' share.
inline void absorb_constants(const AbsorbedQuery& query, const MiddleAngles& page,
                             AbsorbedWeights& out) {
  constexpr int kVecs = kConstantLanes / kVecLanes;
  constexpr int kChains =
      2;  // pairs added up side by side: sums of one chain would wait for each other
  F32 cosine[kChains][kVecs], sine[kChains][kVecs];
  for (int k = 0; k < kChains; ++k) {
    for (int v = 0; v < kVecs; ++v) cosine[k][v] = sine[k][v] = F32{};
  }
  const auto add = [&](int i, int k) __attribute__((always_inline)) {
    const float* at = query.constant + (1 + 2 * i) * kConstantLanes;
    for (int v = 0; v < kVecs; ++v) {
      cosine[k][v] += load<F32>(at + v * kVecLanes) * page.turns[i];
      sine[k][v] += load<F32>(at + kConstantLanes + v * kVecLanes) * page.turns[page.pairs + i];
    }
  };
  int i = 0;
  for (; i + kChains <= query.pairs; i += kChains) {
    for (int k = 0; k < kChains; ++k) add(i + k, k);
  }
  for (; i < query.pairs; ++i) add(i, 0);
  float sums[kConstantLanes];
  for (int v = 0; v < kVecs; ++v) {
    F32 sum = load<F32>(query.constant + v * kVecLanes);
    for (int k = 0; k < kChains; ++k) sum += cosine[k][v] + sine[k][v];
    store(sums + v * kVecLanes, sum);
  }
  std::memcpy(out.constant, sums, sizeof(out.constant));
}

// Weights of the page of `angles`, number `page` of its run; with `nodes`, smooth pairs are
// interpolated.
inline void absorb_page(const AbsorbedQuery& query, const SlowPairs& slow,
                        const MiddleAngles& angles, int page, const float* nodes, int wide_lanes,
                        AbsorbedWeights& out) {
  F32 most[kDegrees][kQuadVecs] = {};
  for (int lane = 0; lane < query.lanes; lane += kAbsorbVecs * kVecLanes) {
    I32 acc[kDegrees][kAbsorbVecs];
    clear(acc);
    add_pairs<3>(query, angles, lane, 0, slow.curved, acc);
    add_pairs<2>(query, angles, lane, slow.curved, nodes ? slow.quick : slow.count, acc);
    for (int v = 0; v < kAbsorbVecs; ++v) {
      const int at = lane + v * kVecLanes;
      F32 weight[kDegrees];
      for (int d = 0; d < kDegrees; ++d) weight[d] = to_float(acc[d][v]);
      if (nodes) {
        for (int k = 0; k < kNodes; ++k) {
          const float* node = nodes + int64_t{k} * 2 * query.lanes + at;
          const float share = kNodeWeights.of[page][k];
          weight[0] += load<F32>(node) * share;
          weight[1] += load<F32>(node + query.lanes) * share;
        }
      } else {
        weight[0] += load<F32>(query.fixed + at);
      }
      for (int d = 0; d < kDegrees; ++d) {
        F32& top = most[d][v % kQuadVecs];
        top = max(top, max(weight[d], -weight[d]));
        store(out.raw + d * query.lanes + at, weight[d]);
      }
    }
  }
  absorb_constants(query, angles, out);
  for (int d = 0; d < kDegrees; ++d) {
    // The largest weight of each row decides its step.
    I32 one, two;
    for (int i = 0; i < kVecLanes; ++i) {
      one[i] = i ^ 1;
      two[i] = i ^ 2;
    }
    F32 inverse[kQuadVecs];
    float tops[kQuadLanes];
    for (int v = 0; v < kQuadVecs; ++v) {
      F32 top = max(most[d][v], __builtin_shuffle(most[d][v], one));
      top = max(top, __builtin_shuffle(top, two));
      store(tops + v * kVecLanes, top);
      inverse[v] = splat(kMostWeight) / max(top, splat(1e-30f));
    }
    I32 middles{}, low_middles{};
    for (int lane = 0; lane < query.lanes; lane += 4 * kVecLanes) {
      const float* raw = out.raw + d * query.lanes + lane;
      int8_t* high = out.high + d * query.lanes + lane;
      I32 code[4];
      for (int v = 0; v < 4; ++v)
        code[v] = round_to_int(load<F32>(raw + v * kVecLanes) * inverse[v % kQuadVecs]);
      store_bytes(high, code);
      middles = dot_wide(middles, load<U32>(query.mids + lane), load<U32>(high));
      if (lane >= wide_lanes) continue;
      for (int v = 0; v < 4; ++v) {
        const F32 rest =
            load<F32>(raw + v * kVecLanes) * inverse[v % kQuadVecs] - to_float(code[v]);
        code[v] = round_to_int(rest * kLowSteps);
      }
      int8_t* low = out.low + d * query.lanes + lane;
      store_bytes(low, code);
      low_middles = dot_wide(low_middles, load<U32>(query.mids + lane), load<U32>(low));
    }
    float taken[kMaxRows] = {};
    const F32 both = to_float(middles) + to_float(low_middles) * (1 / kLowSteps);
    for (int i = 0; i < kVecLanes; ++i) taken[i % kMaxRows] += both[i];
    for (int r = 0; r < kMaxRows; ++r) {
      out.step[d][r] = tops[r * kQuad] / kMostWeight * query.unit[r];
      out.constant[d][r] -= taken[r] / 2 * out.step[d][r];
    }
  }
}

// s[r][64] from a page's weights and codes.
template <bool kUnpacked, int kRows>
inline void absorbed_scores(const uint8_t* lines, const Bands& bands,
                            const AbsorbedWeights& weights, int lanes, float* s) {
  for (int d = 0; d < kDegrees; ++d) {
    const QueryCodes query{weights.high + d * lanes,
                           weights.low + d * lanes,
                           weights.step[d],
                           weights.constant[d],
                           kQuad,
                           kQuadLanes};
    for_each_product<kUnpacked, kRows>(
        lines, bands, query, 0, [&](int r, int group, int part, F32 sum) {
          const int t = tokens_at(group, part);
          float* at = s + r * kPageTokens + t;
          const F32 score = sum * query.step[r] + query.offset[r];
          store(at, d == 0 ? score : load<F32>(at) + score * load<F32>(kChebyshev.of[d] + t));
        });
  }
  for (int t = 0; t < kPageTokens; t += kVecLanes) {
    for (int r = 0; r < kRows; ++r) {
      F32 score = load<F32>(s + r * kPageTokens + t);
      for (int d = kDegrees; d < kConstantDegrees; ++d)
        score += load<F32>(kChebyshev.of[d] + t) * weights.constant[d][r];
      store(s + r * kPageTokens + t, score);
    }
  }
}
