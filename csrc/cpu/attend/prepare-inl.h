// What attend prepares once for all tasks: scaled queries, quantized weights of every head, queries
// absorbed into pre-RoPE channels, rotations to where splits begin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "csrc/core/absorb.h"
#include "csrc/core/parallel.h"
#include "csrc/core/rope_table.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/attend/slow_pairs-inl.h"
#include "csrc/cpu/numbers-inl.h"
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "kernels/format.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Quantizes row `row` of a head's weights, where `constant` multiplies no code.
inline void store_weights(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                          const Bands& bands, const ChannelRow& weights, float constant) {
  const int64_t at = sequence_head * plan.weight_rows + row;
  const int dim = plan.p.keys.layout.head_dim, rank = bands.rank();
  int8_t high[kMaxHeadDim + 4 * kVecLanes], low[kMaxHeadDim + 4 * kVecLanes];
  quantize_row(bands, weights, constant, high, low, plan.steps + at, plan.offsets + at);
  std::memcpy(plan.weights + at * 2 * dim, high, rank);
  std::memcpy(plan.weights + at * 2 * dim + rank, low, rank);
}

// The scaled basis of a head's pre-RoPE channels by key channel.
class PreBasis {
 public:
  // basis [rank, D] bfloat16, scale [rank].
  PreBasis(const uint16_t* basis, const float* scale, int rank, int dim)
      : stride_(static_cast<int>(round_up(rank, 4 * kVecLanes))),
        numbers_(sizeof(float) * dim * stride_) {
    float* numbers = numbers_.as<float>();
    for (int j = 0; j < stride_; j += kVecLanes) {
      for (int d = 0; d < dim; d += kVecLanes) {
        F32 block[kVecLanes];
        for (int i = 0; i < kVecLanes; ++i) {
          block[i] =
              j + i < rank ? load_bfloat16(basis + int64_t{j + i} * dim + d) * scale[j + i] : F32{};
        }
        transpose(block);
        for (int i = 0; i < kVecLanes; ++i) store(numbers + int64_t{d + i} * stride_ + j, block[i]);
      }
    }
  }

  // [rank] and zeros to a whole line of bytes.
  const float* row(int channel) const { return numbers_.as<float>() + int64_t{channel} * stride_; }

 private:
  int stride_;
  AlignedBuffer numbers_;
};

// Decides which channels of a head are columns, and quantizes their weights: all, or those of fast
// pairs in which the head has anything.
inline void prepare_columns(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head,
                            const PreBasis& pre, const float* mean) {
  const int dim = plan.p.keys.layout.head_dim, half = plan.p.keys.codec.rope.rotary_pairs,
            rank = head.pre.rank();
  int16_t* pairs = plan.column_pairs + sequence_head * half;
  const auto coded = [&](int channel) {
    const float* x = pre.row(channel);
    return !std::all_of(x, x + rank, [](float v) { return v == 0; });
  };
  int count = 0, means = 0;
  const auto list = [&](bool with_codes, int& listed) {
    for (int i = 0; i < half; ++i) {
      if (plan.absorbs && plan.slow.slow(plan.p.keys.codec.rope.inv_freq[i])) continue;
      const bool has_codes = !plan.absorbs || coded(i) || coded(i + half);
      if (has_codes != with_codes) continue;
      if (!has_codes && mean[i] == 0 && mean[i + half] == 0) continue;
      pairs[count + means] = static_cast<int16_t>(i);
      ++listed;
    }
  };
  list(true, count);
  list(false, means);
  const Columns columns{pairs, count, means, 2 * half, plan.absorbs ? 0 : dim - 2 * half, half};
  plan.columns[sequence_head] = columns;
  ChannelRow weights{};
  for (int c = 0; c < columns.count(); ++c) {
    const bool used = c < columns.used();
    for (int j = 0; j < rank; ++j) weights[j] = used ? pre.row(columns.channel(c))[j] : 0.0f;
    store_weights(plan, sequence_head, c, head.pre, weights,
                  used ? mean[columns.channel(c)] : 0.0f);
  }
}

// Numbers of a tile of queries by channel, in the order of a quad's lanes: [D, kQuadLanes].
inline void spread_queries(const float* query, int dim, int rows, float* spread) {
  for (int d = 0; d < dim; ++d) {
    for (int lane = 0; lane < kQuadLanes; ++lane)
      spread[d * kQuadLanes + lane] = lane / kQuad < rows ? query[lane / kQuad * dim + d] : 0.0f;
  }
}

// What lanes `lane` on of channel `channel` of the queries make of the basis.
inline F32 spread_product(const float* spread, const PreBasis& pre, int query_channel,
                          int key_channel, int lane) {
  return load<F32>(spread + query_channel * kQuadLanes + lane % kQuadLanes) *
         splat_four(pre.row(key_channel) + lane / kQuadLanes * kQuad);
}

// Absorbs a tile of up to kMaxRows queries [rows, D].
inline void absorb_tile(const SlowPairs& slow, const Rope& rope, const float* query, int rows,
                        int dim, const PreBasis& pre, const float* mean, const AbsorbedQuery& out) {
  const int half = rope.rotary_pairs;
  float spread[kMaxHeadDim * kQuadLanes];
  spread_queries(query, dim, rows, spread);
  const auto turned = [&](int i, int lane, F32& with_cosine, F32& with_sine) {
    const int a = slow.pair[i], b = a + half;
    with_cosine = spread_product(spread, pre, a, a, lane) + spread_product(spread, pre, b, b, lane);
    with_sine = spread_product(spread, pre, b, a, lane) - spread_product(spread, pre, a, b, lane);
  };
  // Units that let no number pass 16 bits and no sum of products 32. Rows share a vector in fours, so
  // each lane of a row takes the most of all.
  F32 most[kQuadVecs] = {}, sums[kQuadVecs] = {};
  for (int lane = 0; lane < out.lanes; lane += kVecLanes) {
    F32 sum{}, c, s;
    F32& top = most[lane % kQuadLanes / kVecLanes];
    for (int i = 0; i < slow.count; ++i) {
      turned(i, lane, c, s);
      c = max(c, -c);
      s = max(s, -s);
      top = max(top, max(c, s));
      sum += c + s;
    }
    F32& largest = sums[lane % kQuadLanes / kVecLanes];
    largest = max(largest, sum);
  }
  float inverse[kQuadLanes];
  for (int r = 0; r < kMaxRows; ++r) {
    float top = 0, sum = 0;
    for (int j = 0; j < kQuad; ++j) {
      const int lane = r * kQuad + j;
      top = std::max(top, most[lane / kVecLanes][lane % kVecLanes]);
      sum = std::max(sum, sums[lane / kVecLanes][lane % kVecLanes]);
    }
    const float largest = std::max(top / 32767.0f, sum / kTurnUnits);
    const float unit = largest > 0 ? largest : 1.0f;
    out.unit[r] = unit / kCosineUnits;
    for (int j = 0; j < kQuad; ++j) inverse[r * kQuad + j] = 1.0f / unit;
  }
  for (int lane = 0; lane < out.lanes; lane += kVecLanes) {
    const F32 scale = load<F32>(inverse + lane % kQuadLanes);
    F32 c, s;
    for (int i = 0; i < slow.count; ++i) {
      turned(i, lane, c, s);
      const I32 low = round_to_int(c * scale) & 0xffff, high = round_to_int(s * scale) << 16;
      store(out.turn + int64_t{i} * out.lanes + lane, low | high);
    }
    F32 fixed{};
    for (int d = 2 * half; d < dim; ++d) fixed += spread_product(spread, pre, d, d, lane);
    store(out.fixed + lane, fixed * scale * kCosineUnits);
  }

  std::memset(out.constant, 0, sizeof(float) * (1 + 2 * slow.count) * kConstantLanes);
  for (int r = 0; r < rows; ++r) {
    const float* q = query + r * dim;
    for (int d = 2 * half; d < dim; ++d) out.constant[r] += q[d] * mean[d];
    for (int i = 0; i < slow.count; ++i) {
      const int a = slow.pair[i], b = a + half;
      const float c = q[a] * mean[a] + q[b] * mean[b], s = q[b] * mean[a] - q[a] * mean[b];
      float* with_cosine = out.constant + (1 + 2 * i) * kConstantLanes + r;
      float* with_sine = with_cosine + kConstantLanes;
      // Odd degrees take the imaginary part.
      for (int d = 0; d < kConstantDegrees; ++d) {
        with_cosine[d * kMaxRows] = (d % 2 ? s : c) * slow.factor[d][i];
        with_sine[d * kMaxRows] = (d % 2 ? -c : s) * slow.factor[d][i];
      }
    }
  }
}

// Scales the queries of one (sequence, KV head) and prepares what multiplies its codes.
inline void prepare_head(const AttendPlan& plan, int64_t sequence_head) {
  const AttendParams& p = plan.p;
  const int64_t b = sequence_head / p.keys.layout.num_heads,
                h = sequence_head % p.keys.layout.num_heads;
  const int dim = p.keys.layout.head_dim;
  const HeadPlan& head = plan.head(h);
  float* query = plan.query + sequence_head * plan.rows * dim;
  const float factor = p.queries.sm_scale * kLog2E;
  for (int64_t i = 0; i < plan.rows * dim; i += kVecLanes) {
    store(query + i,
          load_as_float(p.queries.data, p.queries.dtype, sequence_head * plan.rows * dim + i) *
              factor);
  }
  if (plan.pages(b) == 0) return;

  const uint16_t* basis = p.keys.codec.basis + (b * p.keys.layout.rank + head.first_channel) * dim;
  const float* scale = p.keys.codec.scale + b * p.keys.layout.rank + head.first_channel;
  const float* mean = p.keys.codec.mean + sequence_head * dim;
  if (plan.has_pre()) {
    const PreBasis pre(basis, scale, head.pre.rank(), dim);
    prepare_columns(plan, sequence_head, head, pre, mean);
    for (int64_t tile = 0; plan.absorbs && tile < plan.tiles(); ++tile) {
      const int64_t row = tile * kMaxRows;
      absorb_tile(plan.slow, p.keys.codec.rope, query + row * dim,
                  static_cast<int>(std::min<int64_t>(kMaxRows, plan.rows - row)), dim, pre, mean,
                  plan.absorbed(sequence_head, tile));
    }
  }
  if (!plan.has_post()) return;
  basis += int64_t{head.pre.rank()} * dim;
  scale += head.pre.rank();
  if (p.keys.layout.rope == RopeMode::kHybrid) mean = p.keys.codec.post_mean + sequence_head * dim;
  ChannelRow weights{};
  for (int64_t row = 0; row < plan.rows; ++row) {
    const float* q = query + row * dim;
    for (int j = 0; j < head.post.rank(); ++j)
      weights[j] = dot_basis(basis + int64_t{j} * dim, q, dim) * scale[j];
    store_weights(plan, sequence_head, plan.pre_rows + row, head.post, weights,
                  dot_rows(q, mean, dim));
  }
}

// Twice the middle codes of every head's pre-RoPE channels, in the order of a tile's weights.
inline void prepare_mids(const AttendPlan& plan) {
  for (int h = 0; h < plan.p.keys.layout.num_heads; ++h) {
    const Bands& pre = plan.head(h).pre;
    uint8_t* mids = plan.mids + int64_t{h} * plan.lanes;
    for (int lane = 0; lane < plan.lanes; ++lane) {
      const int width = pre.width(lane / kQuadLanes * kQuad);
      mids[lane] = static_cast<uint8_t>((1 << width) - 1);
    }
  }
}

// Pages whose angles are one task.
inline constexpr int64_t kAngleChunk = 4 * kRunPages;

// Rotations to the first positions and the middles of pages chunk * kAngleChunk and on of sequence b.
inline void prepare_angles(const AttendPlan& plan, int64_t b, int64_t chunk) {
  const int half = plan.p.keys.codec.rope.rotary_pairs;
  const int64_t first = chunk * kAngleChunk;
  const int64_t last = std::min(first + kAngleChunk, plan.angle_pages());
  double rotation[kMaxHeadDim];
  const int64_t position = plan.p.keys.first_position ? plan.p.keys.first_position[b] : 0;
  start_rotation(plan.p.keys.codec.rope, position + first * kPageTokens, rotation);
  for (int64_t page = first; page < last; ++page) {
    float* start = plan.starts + (b * plan.angle_pages() + page) * 2 * half;
    for (int i = 0; i < 2 * half; ++i) start[i] = static_cast<float>(rotation[i]);
    if (plan.absorbs) set_middle(plan.slow, rotation, half, plan.page_middle(b, page));
    advance_rotation(rotation, plan.angles.page_turn(), half);
  }
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
