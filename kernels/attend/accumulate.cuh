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
    with_dtype(dtype, [&]<DataType kType>() { add_as<kType>(values, first, head_dim, p, tokens); });
  }

  SVDQ_DEVICE void write(float* out, int64_t stride, int head_dim) const {
    for (int i = 0; i < kChannels; ++i) {
      const int channel = thread_index() + i * kAttendThreads;
      if (channel >= head_dim) break;
      for (int row = 0; row < kRowTile; ++row) store(out + row * stride + channel, out_[i][row]);
    }
  }

 private:
  template <DataType kType>
  SVDQ_DEVICE void add_as(const void* values, int64_t first, int head_dim, const Probabilities& p,
                          TokenRange tokens) {
    constexpr int kAtOnce = 16 / kChannels;  // tokens whose loads are in flight together
    for (int first_token = tokens.begin; first_token < tokens.end; first_token += kAtOnce) {
      float v[kAtOnce][kChannels];
      SVDQ_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int t = first_token + k < tokens.end ? first_token + k : tokens.end - 1;
        SVDQ_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const int own = thread_index() + i * kAttendThreads;
          const int channel = own < head_dim ? own : 0;  // what is not the thread's is not written
          v[k][i] = load_number_as<kType>(values, first + int64_t{t} * head_dim + channel);
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

  float out_[kChannels][kRowTile];
};

}  // namespace svdq::device
