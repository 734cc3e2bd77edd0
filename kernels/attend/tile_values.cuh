// Products of probabilities and values for the 16 query rows of a warp, on tensor cores. The
// probabilities come as softmax_tiles leaves them (kernels/attend/tile_rows.cuh).
#pragma once

#include "kernels/attend/accumulate.cuh"
#include "kernels/attend/tile_rows.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

// Packed values, still rotated. Column n of output tile 2 b + h stands for channel 16 b + 2 n + h, so that a thread
// holds four neighbouring channels of a row.
template <int kDim>
class PackedTileValues {
 public:
  static constexpr int kBlocks = kDim / kLanes / kWarpParts<kDim>;  // of 16 channels, of a warp

  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kBlocks; ++i) {
      for (int h = 0; h < 2; ++h) {
        for (int e = 0; e < 4; ++e) out_[i][h][e] = 0.0f;
      }
    }
  }

  // Starts to copy the values of a page.
  SVDQ_DEVICE static void copy(uint8_t* to, const uint8_t* from, const ValueLayout& value,
                               TokenRange, int threads) {
    copy_lines<0>(to, from, value.scale_bytes(), thread_index(), threads);
    for_each_plane(value, [&]<int kWidth, int>(int64_t plane) {
      copy_lines<kWidth>(to + plane, from + plane, band_bytes(kWidth, value.head_dim),
                         thread_index(), threads);
    });
  }

  // Scales of slots that do not count may be anything, NaN too.
  SVDQ_DEVICE static void clear(uint8_t* page, TokenRange tokens) {
    if (thread_index() < kTokenQuads) clear_scales(page, thread_index(), tokens);
  }

  // out = out * factor + P V
  SVDQ_DEVICE void add(const uint8_t* page, const ValueLayout& value,
                       const float (&p)[2 * kGroups][4], const float (&factor)[2], int part) {
    const Operand operand = prepare(page, value, p);
    with_value_bits(value.bits, [&]<int kBits>() {
      SVDQ_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        const int block = part * kBlocks + i;
        if (block * kLanes >= value.head_dim) break;
        float sum[2][4] = {};
        multiply_block<kBits>(page, value, block, operand, sum);
        SVDQ_UNROLL
        for (int h = 0; h < 2; ++h) {
          SVDQ_UNROLL
          for (int e = 0; e < 4; ++e) {
            const float old = out_[i][h][e] * factor[e / 2] - operand.middle[e / 2];
            out_[i][h][e] = old + sum[h][e] * operand.unit;
          }
        }
      }
    });
  }

  // Writes 16 rows to out + row * stride.
  SVDQ_DEVICE void write(float* out, int64_t stride, int head_dim, int part) const {
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const int block = part * kBlocks + i;
      if (block * kLanes >= head_dim) break;
      SVDQ_UNROLL
      for (int half = 0; half < 2; ++half) {
        float* to = out + (lane_index() / 4 + half * 8) * stride + block * kLanes;
        const auto &even = out_[i][0], &odd = out_[i][1];
        const int e = 2 * half;
        store(reinterpret_cast<Floats4*>(to + lane_index() % 4 * 4),
              Floats4{{even[e], odd[e], even[e + 1], odd[e + 1]}});
      }
    }
  }

 private:
  // Probabilities times scales as A operands, and what turns products into values.
  struct Operand {
    uint32_t a[kGroups][4];
    float unit;
    float middle[2];  // of this thread's rows: what the middle code takes off
  };

  // sum += P V of a block of 16 channels, in units of codes.
  template <int kBits>
  SVDQ_DEVICE static void multiply_block(const uint8_t* page, const ValueLayout& value, int block,
                                         const Operand& operand, float (&sum)[2][4]) {
    constexpr int kWidth = low_plane_width(kBits), kUnits = 8 / kWidth;
    const int row = lane_index() / 4, quad = lane_index() % 4;
    const uint8_t* codes = page + value.code_offset();
    const uint8_t* high_lines =
        page + value.high_plane_offset() + block * band_bytes(1, kLanes) + row * 8;
    Words2 high = {};
    SVDQ_UNROLL
    for (int step = 0; step < kGroups; ++step) {
      const int unit = block * kTokenQuads + step * kGroups + quad;
      const int piece = swizzle<kWidth>(unit / kUnits * 4 + row / 2);
      const Words2 lanes = load(reinterpret_cast<const Words2*>(codes + piece * 16) + row % 2);
      if (kBits == 3 && step % 2 == 0)
        high = load(reinterpret_cast<const Words2*>(high_lines + step / 2 * kLineBytes));
      SVDQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t b[2];
        unpack_quad<kWidth>(lanes.word[h], unit % kUnits, b[0], b[1]);
        if constexpr (kBits == 3) {
          // The high bits of a line's units 4 (step % 2) + quad, moved over the low bits.
          constexpr uint32_t kFours = 0x00040004u;
          const uint32_t bits =
              step % 2 == 0 ? high.word[h] << 2 >> quad : high.word[h] >> (2 + quad);
          b[0] |= bits & kFours;
          b[1] |= bits >> 8 & kFours;
        }
        MmaHalf::run(sum[h], operand.a[step], b);
      }
    }
  }

  // Scale of token t of four.
  SVDQ_DEVICE static float scale_of(uint32_t quad, int t) {
    return half_to_float(scale_as_half(static_cast<int>(quad >> (8 * t) & 0xffu)));
  }

  SVDQ_DEVICE static Operand prepare(const uint8_t* page, const ValueLayout& value,
                                     const float (&p)[2 * kGroups][4]) {
    Operand operand;
    uint32_t scales[kGroups];  // of this thread's quad of each group of tokens
    float largest = 0.0f;
    SVDQ_UNROLL
    for (int step = 0; step < kGroups; ++step) {
      scales[step] = load(reinterpret_cast<const uint32_t*>(page) + step * 4 + lane_index() % 4);
      SVDQ_UNROLL
      for (int t = 0; t < kQuad; ++t) {
        const float scale = scale_of(scales[step], t);
        largest = scale > largest ? scale : largest;
      }
    }
    SVDQ_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    // A power of two brings the largest scale to 2^13 .. 2^14, high in the range of a half.
    // Probabilities are at most 1, and weights that get lost are below 2^-38 of the largest scale.
    constexpr uint32_t kOne = 127u << 23, kUp = 13u << 23;
    const uint32_t exponent = float_as_int(largest) & 0x7f800000u;
    const bool nothing = exponent == 0;
    const float up = nothing ? 0.0f : int_as_float(2 * kOne + kUp - exponent);
    operand.unit = nothing ? 0.0f : int_as_float(exponent - kUp) * kCodeUnit;
    // Codes are less by the middle one: the sum of what multiplies them, a product with ones.
    float sum[4] = {};
    SVDQ_UNROLL
    for (int step = 0; step < kGroups; ++step) {
      float scale[kQuad];
      SVDQ_UNROLL
      for (int t = 0; t < kQuad; ++t) scale[t] = scale_of(scales[step], t) * up;
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {  // rows, rows + 8; then the quad's odd tokens
        const auto& tile = p[2 * step + w / 2];
        const int e = w % 2 * 2;
        operand.a[step][w] = pack_half2(tile[e] * scale[w / 2], tile[e + 1] * scale[w / 2 + 2]);
      }
      MmaHalf::run(sum, operand.a[step], {0x00010001u, 0x00010001u});
    }
    SVDQ_UNROLL
    for (int i = 0; i < 2; ++i)
      operand.middle[i] = sum[2 * i] * (mid_code(value.bits) * operand.unit);
    return operand;
  }

  float out_[kBlocks][2][4];
};

// Values of 16 bits, in a matrix in shared memory. Probabilities are as many terms as keep their
// digits.
template <int kDim, DataType kType>
class WindowTileValues {
 public:
  using Numbers = Numbers16<kType>;
  using Matrix = TokenMatrix<kDim>;
  static constexpr int kBlocks = kDim / kLanes / kWarpParts<kDim>;

  SVDQ_DEVICE void reset() {
    for (int i = 0; i < kBlocks; ++i) {
      for (int h = 0; h < 2; ++h) {
        for (int e = 0; e < 4; ++e) out_[i][h][e] = 0.0f;
      }
    }
  }

  SVDQ_DEVICE static void copy(uint8_t* to, const uint8_t* from, const ValueLayout& value,
                               TokenRange tokens, int threads) {
    Matrix::copy(to, from, kPageTokens, value.head_dim, threads,
                 [&](int token) { return tokens.has(token); });
  }

  SVDQ_DEVICE static void clear(uint8_t*, TokenRange) {}

  // out = out * factor + P V of kTiles * 8 tokens
  template <int kTiles>
  SVDQ_DEVICE void add(const uint8_t* matrix, const ValueLayout& value, const float (&p)[kTiles][4],
                       const float (&factor)[2], int part) {
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      SVDQ_UNROLL
      for (int e = 0; e < 8; ++e) out_[i][e / 4][e % 4] *= factor[e % 4 / 2];
    }
    const int number = lane_index() / 8, row = lane_index() % 8;  // this lane's row of a matrix
    SVDQ_UNROLL
    for (int step = 0; step < kTiles / 2; ++step) {
      uint32_t a[Numbers::kTerms][4];
      SVDQ_UNROLL
      for (int w = 0; w < 4; ++w) {
        const auto& tile = p[2 * step + w / 2];
        float low = tile[w % 2 * 2] * Numbers::kUnit, high = tile[w % 2 * 2 + 1] * Numbers::kUnit;
        SVDQ_UNROLL
        for (int term = 0; term < Numbers::kTerms; ++term) {
          a[term][w] = Numbers::pack(low, high);
          low -= Numbers::low(a[term][w]);
          high -= Numbers::high(a[term][w]);
        }
      }
      const int token = step * kLanes + 2 * row + number % 2;
      SVDQ_UNROLL
      for (int i = 0; i < kBlocks; ++i) {
        const int block = part * kBlocks + i;
        if (block * kLanes >= value.head_dim) break;
        uint32_t b[4];
        LoadMatrix<4, true>::run(b, matrix + Matrix::offset(token, block * 2 + number / 2));
        SVDQ_UNROLL
        for (int term = 0; term < Numbers::kTerms; ++term) {
          Numbers::Mma::run(out_[i][0], a[term], {b[0], b[1]});
          Numbers::Mma::run(out_[i][1], a[term], {b[2], b[3]});
        }
      }
    }
  }

  SVDQ_DEVICE void write(float* out, int64_t stride, int head_dim, int part) const {
    SVDQ_UNROLL
    for (int i = 0; i < kBlocks; ++i) {
      const int block = part * kBlocks + i;
      if (block * kLanes >= head_dim) break;
      SVDQ_UNROLL
      for (int h = 0; h < 2; ++h) {
        SVDQ_UNROLL
        for (int half = 0; half < 2; ++half) {
          float* to = out + (lane_index() / 4 + half * 8) * stride + block * kLanes + h * 8;
          store(reinterpret_cast<Floats2*>(to) + lane_index() % 4,
                Floats2{out_[i][h][2 * half] / Numbers::kUnit,
                        out_[i][h][2 * half + 1] / Numbers::kUnit});
        }
      }
    }
  }

 private:
  float out_[kBlocks][2][4];
};

}  // namespace svdq::device
