// An attend problem of random pages and a random window, and its answer from the formula with a derived tolerance for
// each row.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "csrc/core/absorb.h"
#include "tests/core/reference.h"

namespace svdq::testing {

struct AttendCase {
  RopeMode rope = RopeMode::kPre;
  int head_dim = 64;
  int rotary_pairs = 32;
  HeadBands bands = {{{4, 8, 4, 8}}, {{0, 12, 4, 16}}};
  HeadBands pre_bands = {};  // hybrid only; empty: none
  ValueBits v_bits = 4;
  int group = 2;  // query heads of a KV head
  int q_len = 1;
  DataType dtype = DataType::kFloat32;         // of queries and outputs
  DataType window_dtype = DataType::kFloat32;  // of the window, outliers and uncompressed values
  std::vector<int> cache_seqlens = {130, 70};
  std::vector<int> window_lens = {9, 3};
  std::vector<int> first_positions = {};  // empty: null
  int sink_tokens = 0;
  bool causal = true;
  int outliers = 0;  // keys of each head and sequence that are held uncompressed too
  // Pages are gathered: each head's tokens come from slots of their own, or from none.
  bool gathered = false;
  float softcap = 0;    // 0: none
  bool sinks = false;   // learned
  int window_size = 0;  // 0: all
  // Folded rows that int8 represents exactly, so that scores are exact up to float rounding.
  bool exact_folding = false;
};

// The case in every RoPE mode: hybrid without pre-RoPE channels, and with some.
inline std::vector<AttendCase> in_every_mode(AttendCase c) {
  std::vector<AttendCase> all;
  for (RopeMode mode : {RopeMode::kPre, RopeMode::kPost, RopeMode::kHybrid}) {
    c.rope = mode;
    all.push_back(c);
  }
  const Bands pre[] = {{{4, 4, 0, 8}}, {{0, 0, 4, 0}}, {{0, 0, 0, 0}}};
  for (size_t h = 0; h < c.bands.size(); ++h) c.pre_bands.push_back(pre[h % 3]);
  all.push_back(c);
  return all;
}

inline const char* mode_of(const AttendCase& c) {
  return c.rope == RopeMode::kPre    ? "pre"
         : c.rope == RopeMode::kPost ? "post"
         : c.pre_bands.empty()       ? "rotated mean"
                                     : "hybrid";
}

// One query row's answer.
struct Attended {
  reference::Row out, out_tolerance;
  double lse, lse_tolerance;
};

class AttendProblem {
 public:
  AttendProblem(const AttendCase& c, uint64_t stream);

  // Runs a backend; outputs start as NaN.
  void run(const Backend& backend, const Executor& executor);
  Attended expected(int b, int query_head, int i) const;

  double out(int b, int query_head, int i, int d) const {
    return read_number(&out_[size_of(c_.dtype) * (row(b, query_head, i) * c_.head_dim + d)],
                       c_.dtype);
  }
  double lse(int b, int query_head, int i) const { return lse_[row(b, query_head, i)]; }
  const std::vector<uint8_t>& out_bytes() const { return out_; }

  int batch() const { return static_cast<int>(c_.cache_seqlens.size()); }
  int num_heads() const { return static_cast<int>(c_.bands.size()); }
  int num_qo_heads() const { return num_heads() * c_.group; }

 private:
  // A key that a query sees, and the error of its score.
  struct Seen {
    double score, error;
    reference::Row value;
    int page;             // -1: of the window
    reference::Row code;  // value over scale, of packed values
    double scale;
    double
        range;  // of packed values: magnitude of the numbers that a rotated value is computed from
  };

  int64_t row(int b, int query_head, int i) const {
    return (int64_t{b} * num_qo_heads() + query_head) * c_.q_len + i;
  }
  int64_t query_at(int b, int query_head, int i) const {
    return row(b, query_head, i) * c_.head_dim;
  }
  int64_t window_at(int b, int h, int e) const {
    return b * window_batch_stride_ + h * window_head_stride_ + int64_t{e} * c_.head_dim;
  }
  void make_pages(Random& random);
  void make_outliers(Random& random);
  void make_token_slots(Random& random);
  // Slot of token `token` of the pages, which determines its position; -1 if it has none.
  int64_t slot_of(int b, int h, int token) const;
  // Leading slots of the pages that are sinks, which gathered pages do not hold.
  int skipped() const { return c_.gathered ? 0 : c_.sink_tokens; }
  // Slot that query i would have, and that the window's token e has.
  int64_t query_slot(int b, int i) const;
  int64_t window_slot(int b, int e) const;
  // True if query i of sequence b has this slot in its sliding window.
  bool in_window(int b, int i, int64_t slot) const {
    return c_.window_size == 0 || slot > query_slot(b, i) - c_.window_size;
  }
  // Applies the softcap to a score and its error.
  void cap(Seen& seen) const;
  // Index of a slot's uncompressed key in outlier_keys_, -1 if it has none.
  int64_t outlier_at(int b, int h, int slot) const;
  void make_basis(Random& random);
  Seen packed(int b, int h, int slot, const reference::Row& query) const;
  Seen window_token(int b, int h, int e, const reference::Row& query) const;
  void score_uncompressed(const uint8_t* key, const reference::Row& query, Seen& seen) const;
  bool has_pre() const { return c_.rope != RopeMode::kPost; }
  bool has_post() const { return c_.rope != RopeMode::kPre; }
  double pre_error(int b, int h, int slot, const reference::Row& query,
                   const reference::Row& rotated) const;
  double post_error(int b, int h, int slot, const reference::Row& query) const;
  // True if this pair is absorbed into the query; -1: the channels that do not rotate.
  bool absorbed(int pair) const;
  double distances(const std::vector<reference::Channel>& channels, int b, int slot) const;
  // sum_j |code_j - mid_j| * scale_j / 2, where weight(channel) gives the numbers of one folded row.
  template <typename Weight>
  double row_error(const std::vector<reference::Channel>& channels, int b, int slot,
                   const Weight& weight) const;
  double scaled_basis(int b, const reference::Channel& channel, int d) const;
  double first_position(int b) const { return first_positions_.empty() ? 0 : first_positions_[b]; }
  const uint8_t* key_page(int b, int slot) const {
    return &k_pages_[table_[b * table_stride_ + slot / kPageTokens] * layout_.k_page_bytes()];
  }
  static double product_error(const std::vector<Seen>& seen, double lse, int d);

  AttendCase c_;
  Layout layout_;
  std::vector<float> frequencies_;
  Rope rope_;
  std::vector<std::vector<reference::Channel>> pre_, post_;  // channels per head
  std::vector<uint8_t> query_, window_keys_, window_values_, outlier_keys_, k_pages_, v_pages_,
      out_;
  int outlier_room_ = 0;
  std::vector<int32_t> outlier_slots_, token_slots_, table_, cache_seqlens_, window_lens_,
      first_positions_, query_positions_;
  int64_t table_stride_ = 0, window_batch_stride_ = 0, window_head_stride_ = 0;
  std::vector<uint16_t> basis_;
  std::vector<float> scale_, mean_, post_mean_, lse_, sinks_;
  float sm_scale_;
};

}  // namespace svdq::testing
