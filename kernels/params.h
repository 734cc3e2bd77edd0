// One plain struct per stage with all that a backend needs to run it. Pointers carry [shape] and dtype; the
// caller has checked everything and owns all memory. H KV heads, Hq query heads, D head_dim, R rank
// of all heads together.
#pragma once

#include <cstdint>

#include "kernels/format.h"

namespace svdq {

enum class DataType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Channels of one head and where they and its values lie. pre-RoPE and post-RoPE channels follow each other in the
// basis and in the page.
struct HeadPlan {
  Bands pre;
  Bands post;
  int first_channel;  // row of this head's first channel in basis and scale
  int64_t k_offset;   // byte of this head's codes inside a key page
  ValueLayout value;
  int64_t v_offset;  // byte of this head's values inside a value page

  SVDQ_HOST_DEVICE constexpr int page_bytes() const { return pre.page_bytes() + post.page_bytes(); }
  SVDQ_HOST_DEVICE constexpr int rank() const { return pre.rank() + post.rank(); }
  // First channel of the post-RoPE part.
  SVDQ_HOST_DEVICE constexpr int first_post_channel() const { return first_channel + pre.rank(); }
  SVDQ_HOST_DEVICE constexpr int64_t post_offset() const { return k_offset + pre.page_bytes(); }
};

// Width of the head's channel j, counted in basis order.
SVDQ_HOST_DEVICE constexpr int channel_width(const HeadPlan& head, int j) {
  return j < head.pre.rank() ? head.pre.width(j) : head.post.width(j - head.pre.rank());
}

struct LayoutView {
  int num_heads;
  int head_dim;
  RopeMode rope;
  ValueCoding value_coding;
  int rank;  // R
  int64_t k_page_bytes;
  int64_t v_page_bytes;
  const HeadPlan* heads;  // [H]

  SVDQ_HOST_DEVICE constexpr bool packs_values() const {
    return value_coding == ValueCoding::kPlain;
  }
};

// Rotation of pair i (channels i and i + rotary_pairs) at position p: angle p * inv_freq[i]. rotary_pairs == 0:
// none.
struct Rope {
  const float* inv_freq;  // [rotary_pairs]
  int rotary_pairs;
};

// Keys or values of one sequence, [H, T, D]; the last dimension is contiguous.
struct TokenSource {
  const void* data;
  DataType dtype;
  int64_t head_stride;   // elements
  int64_t token_stride;  // elements
  int64_t num_tokens;
};

// Is every number finite and at most `limit` in magnitude?
struct FiniteParams {
  TokenSource tokens;
  int num_heads;
  int head_dim;
  float limit;
};

struct CovarianceParams {
  TokenSource keys;
  int num_heads;
  int head_dim;
  Rope rope;
  int64_t position;   // of the first token
  float* mean;        // [H, D]
  float* covariance;  // [H, D, D], divided by T
};

// Eigenvectors of the covariances, for backends that have a solver.
struct ComponentsParams {
  float* covariance;  // [H, D, D], overwritten
  int num_heads;
  int head_dim;
  float* components;  // [H, D, D], rows by falling variance
  float* variance;    // [H, D]
};

// Largest factor that makes decoded latents of a channel unbiased, and its inverse; see QuantizerParams.
inline constexpr float kLargestGain = 2.0f;
// Codes of more bits are unbiased as they are, and rounding a longer row anew would cost more than that.
inline constexpr int kUnbiasedWidth = 4;

// Ranges of the channels. With `clip` those of least fourth power of the error, and decoded latents are unbiased along
// the latents of the sample: code and decoded value are those of one scale, but scale and row of the basis are both
// multiplied by the root of the gain <x, x> / <x, decoded>. Then a latent has the same code as before, and its decoded
// value is larger by the gain.
struct QuantizerParams {
  TokenSource keys;
  LayoutView layout;
  Rope rope;
  int64_t position;
  bool clip;
  const float* mean;        // [H, D]
  const float* components;  // [H, D, D], rows by falling variance
  uint16_t* basis;          // [R, D] bfloat16
  float* scale;             // [R]
  float* centred_mean;      // [H, D]
};

// Parameters that decode a layer's keys (SVDq, section 4): key = mean + (codes - mid) * scale @ basis, see
// kernels/format.h. With B sequences each tensor has a leading dimension B.
struct KeyCodec {
  Rope rope;               // of the model; 0 pairs for keys that are coded as they come
  const uint16_t* basis;   // [R, D] bfloat16
  const float* scale;      // [R]
  const float* mean;       // [H, D]; of the pre-RoPE part for hybrid
  const float* post_mean;  // [H, D], hybrid only
};

struct PackKeysParams {
  TokenSource keys;
  LayoutView layout;
  KeyCodec codec;
  int64_t position;
  uint8_t* pages;             // [P, k_page_bytes]
  const int32_t* page_table;  // page of each 64 slots
  int64_t slot;               // of the first token
  float* errors = nullptr;  // [H, T], rows errors_stride apart: |key - decoded key|^2; may be null
  int64_t errors_stride = 0;
};

struct PackValuesParams {
  TokenSource values;
  LayoutView layout;
  uint8_t* pages;  // [P, v_page_bytes]
  const int32_t* page_table;
  int64_t slot;
};

// Slots slot .. slot + num_tokens - 1 of one sequence, to read back.
struct UnpackParams {
  LayoutView layout;
  const uint8_t* pages;       // [P, k_page_bytes] or [P, v_page_bytes]
  const int32_t* page_table;  // page of each 64 slots
  int64_t slot;
  int64_t num_tokens;
};

struct UnpackCodesParams {
  UnpackParams packed;
  uint8_t* codes;  // [num_tokens, R]
};

// Keys to decode, rotated to the positions from `position` on.
struct UnpackKeysParams {
  UnpackParams packed;
  KeyCodec codec;
  int64_t position;
  float* keys;  // [H, num_tokens, D]
};

struct UnpackValuesParams {
  UnpackParams packed;
  DataType dtype;  // of values of 16 and 32 bits
  float* values;   // [H, num_tokens, D]
};

// Packed keys of B sequences in pages of one pool.
struct PackedKeys {
  LayoutView layout;
  KeyCodec codec;             // of each sequence
  int batch;                  // B
  const uint8_t* pages;       // [P, k_page_bytes]
  int64_t num_pages;          // P
  const int32_t* page_table;  // [B, table_stride], page of each 64 slots
  int64_t table_stride;
  const int32_t* cache_seqlens;   // [B], packed slots
  const int32_t* first_position;  // [B], position of slot 0; may be null: zeros
  int sink_tokens;                // leading slots that are skipped: they are in the window
  // Packed slots whose keys are held uncompressed too.
  const int32_t* outlier_slots;  // [B, H, N] ascending, then kNoSlot; may be null
  const void* outlier_keys;      // [B, H, N, D]
  DataType outlier_dtype;
  int num_outliers;  // N
};

// Queries of B sequences, the same number for each.
struct Queries {
  const void* data;  // [B, Hq, L, D] contiguous
  DataType dtype;
  int num_heads;   // Hq, a multiple of H
  int64_t length;  // L
  float sm_scale;  // softmax scale
};

// Uncompressed keys and values: sinks, then the recent window, then the new tokens themselves.
struct Window {
  const void* keys;    // [B, H, E, D], rotated; rows of D contiguous numbers
  const void* values;  // the same shape and strides
  DataType dtype;
  int64_t batch_stride;  // elements
  int64_t head_stride;
  int rows;             // E
  const int32_t* lens;  // [B]
  int sink_rows;  // leading rows that are slots 0, 1, ...; the others end before the queries or with them
};

// What a model does to the logits of its softmax, in addition to scaling them.
struct LogitRules {
  float softcap;       // a logit x becomes softcap * tanh(x / softcap); 0: it stays
  const float* sinks;  // [Hq], one more logit of each query head, without a value; may be null
  int window_size;     // a query at position p sees keys at positions > p - window_size; 0: all
  const int32_t* query_position;  // [B], position of the first query; null without window_size
};

// What attend is given as part of a decode step; null pointers: it is none.
struct StepLengths {
  const int32_t* faults;   // [B] not zero: the sequence keeps its length, and its results are NaN
  const int32_t* kept;     // [B] window rows without the new ones
  int32_t* window_lens;    // [B] gets the lengths of the plan
  int32_t* cache_seqlens;  // [B] likewise
  // Keys are stored times their gain and queries divided by it, rounded to their dtype; may be null: ones.
  const void* gain;  // [B, H, D]
  DataType gain_dtype;
};

struct AttendParams {
  PackedKeys keys;
  Queries queries;
  Window window;
  LogitRules rules;
  const uint8_t* v_pages;  // [P, v_page_bytes], as many as key pages
  DataType v_dtype;        // of values of 16 and 32 bits in v_pages
  bool causal;
  // Slot that each token of gathered pages (GatherParams) came from, which tells its position;
  // kNoSlot for none. May be null: token i of the pages is slot i.
  const int32_t* token_slots;  // [B, H, table_stride * 64] ascending
  void* out;                   // [B, Hq, L, D] in the queries' dtype
  float* lse;                  // [B, Hq, L], natural logarithm, of sinks too
  StepLengths step;
};

// Key sparsity: which packed tokens are worth attending. Queries q of a KV head (rows: its query
// heads times q_len) score slot t with the head's first `channels` channels in basis order, where
// pre-RoPE channels are rotated as if they stood at the middle of their page, and pairs of a frequency
// above kSelectFastest are left out of that:
//   score(q, t) = sm_scale * (q . R_middle (mean + sum_pre (code - mid) scale basis)
//                             + q . (post_mean + sum_post (code - mid) scale basis)).
// A token's weight is the sum over rows of exp(score(q, t) - norm(q)), where norm(q) is the
// log-sum-exp of q's scores over a sample of pages (select_sample_stride), sinks left out. The `budget` tokens of
// largest weight are selected, the earlier of equals, and the outliers with them.
struct SelectParams {
  PackedKeys keys;  // outlier_keys are not read
  Queries queries;
  int channels;              // proxy channels, a multiple of 4, at most kMaxSelectChannels
  int budget;                // tokens to select in addition to the outliers, at least 1
  int32_t* slots;            // [B, H, budget + N] selected slots, ascending, then kNoSlot
  int32_t* outlier_indices;  // [B, H, N] index of each outlier in slots; null without outliers
};

inline constexpr int kMaxSelectChannels = 32;
// Largest angle (radians) between a page's middle and its ends at which a pair still counts.
inline constexpr float kSelectAngle = 1.0f;
// Frequency above which a pair is left out.
inline constexpr float kSelectFastest = kSelectAngle / (kPageTokens / 2);
inline constexpr int kSelectSamplePages = 64;

// Pages stride / 2, stride / 2 + stride, ... are the sample of a sequence with so many pages.
SVDQ_HOST_DEVICE constexpr int64_t select_sample_stride(int64_t pages) {
  const int64_t stride = (pages + kSelectSamplePages - 1) / kSelectSamplePages;
  return stride > 0 ? stride : 1;
}

// Copies the codes of selected tokens, keys and values, into pages of their own: token i of head h
// is slot slots[h][i]. Codes and scales of tokens without a slot become zeros.
struct GatherParams {
  LayoutView layout;
  int batch;
  const uint8_t* k_pages;
  const uint8_t* v_pages;
  int64_t num_pages;          // rows of both pools
  const int32_t* page_table;  // [B, table_stride]
  int64_t table_stride;
  const int32_t* slots;  // [B, H, M], kNoSlot: none
  int64_t num_slots;     // M
  uint8_t* k_out;        // [B * ceil(M / 64), k_page_bytes]
  uint8_t* v_out;        // [B * ceil(M / 64), v_page_bytes]
};

struct MergeParams {
  int64_t rows;
  int head_dim;
  DataType dtype;
  const void* out_a;   // [rows, D]
  const float* lse_a;  // [rows]
  const void* out_b;
  const float* lse_b;
  void* out;
  float* lse;
};

}  // namespace svdq
