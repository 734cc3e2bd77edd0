// Products of probabilities and exact values of up to 64 tokens, for 8 query rows, in plain
// arithmetic.
#pragma once

#include "kernels/pages/page_stream.cuh"
#include "kernels/attend/plan.cuh"

namespace svdq::device {

// Probabilities of a page: token t of group t / 16, its 8 rows side by side. A group is padded so
// that threads that read different groups meet different banks.
struct Probabilities {
  alignas(16) float of[kGroups][kLanes * kRowTile + 8];
};

// Exact values in rows [tokens, head_dim]; a thread owns channels thread, thread + 128, ...
template <int kDim>
class WindowValues {
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
    constexpr int kAtOnce = 16 / kChannels;  // tokens whose loads are in flight together
    for (int first_token = tokens.begin; first_token < tokens.end; first_token += kAtOnce) {
      float v[kAtOnce][kChannels];
      SVDQ_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int t = first_token + k < tokens.end ? first_token + k : tokens.end - 1;
        SVDQ_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const int channel = thread_index() + i * kAttendThreads;
          v[k][i] = channel < head_dim
                        ? load_number(values, dtype, first + int64_t{t} * head_dim + channel)
                        : 0.0f;
        }
      }
      SVDQ_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int t = first_token + k;
        if (t >= tokens.end) break;
        const float* from = &p.of[t / kLanes][t % kLanes * kRowTile];
        const Floats4 low = load(reinterpret_cast<const Floats4*>(from));
        const Floats4 high = load(reinterpret_cast<const Floats4*>(from) + 1);
        SVDQ_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          SVDQ_UNROLL
          for (int row = 0; row < 4; ++row) {
            out_[i][row] += v[k][i] * low.x[row];
            out_[i][row + 4] += v[k][i] * high.x[row];
          }
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
