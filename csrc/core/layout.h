// The layout integers (kernels/format.h, kLayoutHeader), checked, and the offsets that follow from them.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/params.h"

namespace svdq {

class Layout {
 public:
  // Parses and checks the integers; throws Error naming the one that is wrong.
  explicit Layout(const std::vector<int64_t>& ints);

  // Valid as long as this object.
  LayoutView view() const;
  // The same pages with the pre-RoPE channels alone, coded like "pre", or with the post-RoPE channels
  // alone, coded like "post": the stages that fit, pack and unpack run on one part of a hybrid page and
  // leave the other alone. Channels and bytes are where they are in view().
  LayoutView pre_view() const;
  LayoutView post_view() const;

  int num_heads() const { return static_cast<int>(heads_.size()); }
  int head_dim() const { return head_dim_; }
  int rank() const { return rank_; }
  int pre_rank() const { return pre_rank_; }
  int post_rank() const { return rank_ - pre_rank_; }
  RopeMode rope() const { return rope_; }
  bool packs_values() const { return value_coding_ == ValueCoding::kPlain; }
  // Of a value of each head.
  int value_bits(int head) const { return heads_[head].value.bits; }
  int64_t k_page_bytes() const { return k_page_bytes_; }
  int64_t v_page_bytes() const { return v_page_bytes_; }

 private:
  RopeMode rope_;
  ValueCoding value_coding_;
  int head_dim_ = 0;
  int rank_ = 0;
  int pre_rank_ = 0;
  int64_t k_page_bytes_ = 0;
  int64_t v_page_bytes_ = 0;
  std::vector<HeadPlan> heads_;
  std::vector<HeadPlan> pre_heads_;
  std::vector<HeadPlan> post_heads_;
};

// Throws Error unless head_dim is one that the kernels take: a multiple of 16 up to kMaxHeadDim.
void check_head_dim(int64_t head_dim);

}  // namespace svdq
