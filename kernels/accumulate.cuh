// Products of probabilities and values of up to 64 tokens, for 8 query rows: packed values on
// tensor cores, exact ones in plain arithmetic.
#pragma once

#include "kernels/attend_plan.cuh"
#include "kernels/unpack.cuh"

namespace svdq::device {

// Probabilities of a page: token t of group t / 16, its 8 rows side by side. A group is padded so
// that threads that read different groups meet different banks.
struct Probabilities {
  alignas(16) float of[kGroups][kLanes * kRowTile + 8];
};

// The tokens begin .. end - 1 of a page count.
struct TokenRange {
  int begin, end;
  SVDQ_DEVICE bool has(int token) const { return token >= begin && token < end; }
};

// Packed values. A warp owns kDim / 64 blocks of 16 channels; out = V^T P^T, so a thread's four
// numbers of a block are channels l / 4 and l / 4 + 8 of rows 2 (l % 4) and the next.
template <int kDim, int kBits>
class PackedValues {
 public:
  static constexpr int kTiles = kDim / kLanes / kAttendWarps;

  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kTiles; ++i) {
      for (int e = 0; e < 4; ++e) out_[i][e] = 0.0f;
    }
  }

  // out = out * factor + P V of the head's value page in shared memory, its code lines swizzled.
  SVDQ_DEVICE void add(const ValueLayout& value, const uint8_t* page, const Probabilities& p,
                       TokenRange tokens, const float (&factor)[2]) {
    constexpr int kBlockBytes = kTokenQuads * kBits / 8 * kLineBytes;
    Operand operand;
    int group = -1;
    SVDQ_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const int block = warp_index() * kTiles + i;
      if (block * kLanes >= value.head_dim) break;
      if (block * kLanes / value.group_size != group) {
        group = block * kLanes / value.group_size;
        operand = prepare(value, page, group, p, tokens);
      }
      uint32_t a[4][4];
      load_value_fragments<kBits>(page + value.code_offset() + block * kBlockBytes, a);
      float sum[4] = {};
      SVDQ_UNROLL
      for (int step = 0; step < 4; ++step) MmaHalf::run(sum, a[step], operand.b[step]);
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e)
        out_[i][e] =
            out_[i][e] * factor[e & 1] + sum[e] * operand.unit[e & 1] + operand.zero[e & 1];
    }
  }

  // Writes rows 0 .. 7 to out + row * stride.
  SVDQ_DEVICE void write(float* out, int64_t stride, int head_dim) const {
    SVDQ_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const int block = warp_index() * kTiles + i;
      if (block * kLanes >= head_dim) break;
      SVDQ_UNROLL
      for (int e = 0; e < 4; ++e) {
        const Place at = FragmentC::place(lane_index(), e);
        store(out + at.col * stride + block * kLanes + at.row, out_[i][e]);
      }
    }
  }

 private:
  // Probabilities times scales of one group as B operands, and what turns products into values.
  struct Operand {
    uint32_t b[4][2];
    float unit[2];  // of this thread's two output rows
    float zero[2];  // sum of probabilities times zero points
  };

  // Halves 0 .. 15 of 32 bytes.
  SVDQ_DEVICE static void load_halves(const uint8_t* from, float (&to)[16]) {
    SVDQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Words4 words = load(reinterpret_cast<const Words4*>(from) + i);
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {
        to[i * 8 + w * 2] = half_to_float(static_cast<uint16_t>(words.word[w]));
        to[i * 8 + w * 2 + 1] = half_to_float(static_cast<uint16_t>(words.word[w] >> 16));
      }
    }
  }

  // Thread 4 n + c prepares row n, tokens 16 c .. 16 c + 15.
  SVDQ_DEVICE static Operand prepare(const ValueLayout& value, const uint8_t* page, int group,
                                     const Probabilities& p, TokenRange tokens) {
    const int row = lane_index() / 4, run = lane_index() % 4;
    float scale[16], zero[16];
    const int at = (group * kPageTokens + run * 16) * 2;
    load_halves(page + value.scale_offset() + at, scale);
    load_halves(page + value.zero_offset() + at, zero);
    float largest = 0.0f, zeros = 0.0f;
    SVDQ_UNROLL
    for (int t = 0; t < 16; ++t) {
      // Scales and zero points of slots that do not count may be anything, NaN too.
      const bool counts = tokens.has(run * 16 + t);
      const float probability = load(&p.of[run][t * kRowTile + row]);
      scale[t] = counts ? scale[t] * probability : 0.0f;
      zeros += counts ? zero[t] * probability : 0.0f;
      largest = scale[t] > largest ? scale[t] : largest;
    }
    for (int mask = 1; mask <= 2; mask *= 2) {
      zeros += shuffle_xor(zeros, mask);
      const float other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    // A power of two brings the largest weight to 2^13 .. 2^14, high in the range of a half.
    // Weights below 2^-95 are nothing beside any probability that is.
    constexpr uint32_t kOne = 127u << 23, kUp = 13u << 23, kSmallest = 32u << 23;
    const uint32_t exponent = float_as_int(largest) & 0x7f800000u;
    const bool nothing = exponent < kSmallest;
    const float up = nothing ? 0.0f : int_as_float(2 * kOne + kUp - exponent);
    const float down = nothing ? 0.0f : int_as_float(exponent - kUp) * kCodeUnit;
    Operand operand;
    SVDQ_UNROLL
    for (int step = 0; step < 4; ++step) {
      SVDQ_UNROLL
      for (int i = 0; i < 2; ++i) {
        operand.b[step][i] = pack_half2(scale[step * 4 + quad_element(2 * i)] * up,
                                        scale[step * 4 + quad_element(2 * i + 1)] * up);
      }
    }
    SVDQ_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int source = (2 * run + i) * 4;  // a lane of the output row
      operand.unit[i] = shuffle(down, source);
      operand.zero[i] = shuffle(zeros, source);
    }
    return operand;
  }

  float out_[kTiles][4];
};

// Exact values in rows [tokens, head_dim]; a thread owns channels thread, thread + 128, ...
template <int kDim>
class ExactValues {
 public:
  static constexpr int kChannels = (kDim + kAttendThreads - 1) / kAttendThreads;

  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kChannels; ++i) {
      for (int row = 0; row < kRowTile; ++row) out_[i][row] = 0.0f;
    }
  }

  // `factor` [8] in shared memory; `first` is the element of token 0.
  SVDQ_DEVICE void add(const void* values, DataType dtype, int64_t first, int head_dim,
                       const Probabilities& p, TokenRange tokens, const float* factor) {
    for (int row = 0; row < kRowTile; ++row) {
      const float f = load(&factor[row]);
      for (int i = 0; i < kChannels; ++i) out_[i][row] *= f;
    }
    for (int t = tokens.begin; t < tokens.end; ++t) {
      const float* from = &p.of[t / kLanes][t % kLanes * kRowTile];
      const Floats4 low = load(reinterpret_cast<const Floats4*>(from));
      const Floats4 high = load(reinterpret_cast<const Floats4*>(from) + 1);
      SVDQ_UNROLL
      for (int i = 0; i < kChannels; ++i) {
        const int channel = thread_index() + i * kAttendThreads;
        if (channel >= head_dim) break;
        const float v = load_number(values, dtype, first + int64_t{t} * head_dim + channel);
        SVDQ_UNROLL
        for (int row = 0; row < 4; ++row) {
          out_[i][row] += v * low.x[row];
          out_[i][row + 4] += v * high.x[row];
        }
      }
    }
  }

  SVDQ_DEVICE void write(float* out, int64_t stride, int head_dim) const {
    for (int i = 0; i < kChannels; ++i) {
      const int channel = thread_index() + i * kAttendThreads;
      if (channel >= head_dim) break;
      for (int row = 0; row < kRowTile; ++row) store(out + row * stride + channel, out_[i][row]);
    }
  }

 private:
  float out_[kChannels][kRowTile];
};

}  // namespace svdq::device
