// A select problem of random pages, and a check of answers against the formula.
#pragma once

#include <vector>

#include "tests/core/reference.h"

namespace svdq::testing {

struct SelectCase {
  RopeMode rope = RopeMode::kPre;
  int head_dim = 64;
  int rotary_pairs = 32;
  HeadBands bands = {{{4, 8, 4, 8}}, {{0, 12, 4, 16}}};
  HeadBands pre_bands = {};  // hybrid only; empty: none
  int group = 2;             // query heads of a KV head
  int q_len = 1;
  DataType dtype = DataType::kFloat32;
  std::vector<int> cache_seqlens = {330, 70};
  std::vector<int> first_positions = {};  // empty: null
  int sink_tokens = 0;
  int outliers = 0;  // of each head and sequence
  int channels = 8;
  int budget = 40;
  bool same_codes = false;  // in all pages
};

// The case in every RoPE mode: hybrid without pre-RoPE channels, and with some.
std::vector<SelectCase> in_every_mode(SelectCase c);
const char* mode_of(const SelectCase& c);

class SelectProblem {
 public:
  SelectProblem(const SelectCase& c, uint64_t stream);

  // Parameters for a backend, with room for the answer.
  SelectParams params();
  void run(const Backend& backend, const Executor& executor);
  void set_answer(std::vector<int32_t> slots, std::vector<int32_t> indices);
  // Checks that the answer of one head follows from masses within the backends' errors.
  ::testing::AssertionResult check(int b, int h) const;
  ::testing::AssertionResult check() const;

  int batch() const { return static_cast<int>(c_.cache_seqlens.size()); }
  int num_heads() const { return static_cast<int>(c_.bands.size()); }
  int room() const { return c_.budget + outlier_room_; }
  const std::vector<int32_t>& slots() const { return slots_; }
  const std::vector<int32_t>& indices() const { return indices_; }

 private:
  // The natural logarithm of a token's mass, and its error.
  struct Mass {
    double value, error;
  };
  struct Score {
    double value, error;
  };

  void make_pages(Random& random);
  void make_outliers(Random& random);
  std::vector<reference::Channel> proxy_channels(int h) const;
  int pre_rank(int h) const { return layout_.view().heads[h].pre.rank(); }
  // Scores of query row r for all slots.
  std::vector<Score> scores(int b, int h, int64_t r) const;
  std::vector<Mass> masses(int b, int h) const;
  const uint8_t* page(int b, int slot) const {
    return &k_pages_[table_[b * table_stride_ + slot / kPageTokens] * layout_.k_page_bytes()];
  }
  int code(int b, const reference::Channel& c, int slot) const {
    return get_code(page(b, slot), c.address(slot % kPageTokens), c.width);
  }

  SelectCase c_;
  Layout layout_;
  std::vector<float> frequencies_;
  Rope rope_;
  std::vector<uint8_t> query_, k_pages_;
  int outlier_room_ = 0;
  std::vector<int32_t> outlier_slots_, table_, cache_seqlens_, first_positions_, slots_, indices_;
  int64_t table_stride_ = 0;
  std::vector<uint16_t> basis_;
  std::vector<float> scale_, mean_, post_mean_;
  float sm_scale_;
};

}  // namespace svdq::testing
