#include "csrc/core/layout.h"

#include "csrc/core/error.h"

namespace svdq {
namespace {

ValueLayout parse_value(int64_t bits, ValueCoding coding, int64_t head, int64_t head_dim) {
  if (coding == ValueCoding::kPlain) {
    SVDQ_CHECK(bits >= 2 && bits <= 4, "layout: head ", head,
               " must have values of 2, 3 or 4 bits, got ", bits);
  } else {
    SVDQ_CHECK(bits == 16 || bits == 32, "layout: head ", head,
               " must have values of 16 or 32 bits, got ", bits);
  }
  return {static_cast<int>(bits), static_cast<int>(head_dim)};
}

Bands parse_bands(const int64_t* counts, int64_t head) {
  Bands bands{};
  for (int w = 0; w < kNumWidths; ++w) {
    const int granularity = band_granularity(kWidths[w]);
    SVDQ_CHECK(counts[w] >= 0 && counts[w] <= kMaxHeadDim && counts[w] % granularity == 0,
               "layout: head ", head, " must have a multiple of ", granularity, " channels of ",
               kWidths[w], " bits, got ", counts[w]);
    bands.count[w] = static_cast<int>(counts[w]);
  }
  return bands;
}

}  // namespace

void check_head_dim(int64_t head_dim) {
  SVDQ_CHECK(head_dim > 0 && head_dim % kLanes == 0 && head_dim <= kMaxHeadDim,
             "head_dim must be a multiple of ", kLanes, " up to ", kMaxHeadDim, ", got ", head_dim);
}

Layout::Layout(const std::vector<int64_t>& ints) {
  SVDQ_CHECK(ints.size() >= kLayoutHeader, "layout: expected at least ", kLayoutHeader,
             " integers, got ", ints.size());
  SVDQ_CHECK(ints[0] == kFormatVersion, "layout: these pages have format version ", ints[0],
             ", this build reads version ", kFormatVersion);
  const int64_t num_heads = ints[1];
  SVDQ_CHECK(num_heads > 0 && num_heads <= 4096, "layout: num_kv_heads must be 1 to 4096, got ",
             num_heads);
  SVDQ_CHECK(static_cast<int64_t>(ints.size()) == kLayoutHeader + num_heads * kLayoutPerHead,
             "layout: expected ", kLayoutHeader + num_heads * kLayoutPerHead, " integers for ",
             num_heads, " heads, got ", ints.size());
  check_head_dim(ints[2]);
  SVDQ_CHECK(ints[3] >= 0 && ints[3] <= 2,
             "layout: rope mode must be 0 (pre), 1 (post) or 2 (hybrid), got ", ints[3]);
  rope_ = static_cast<RopeMode>(ints[3]);
  SVDQ_CHECK(ints[4] == static_cast<int>(KeyCoding::kPlain),
             "layout: this build reads keys of coding 0 (plain), got ", ints[4]);
  SVDQ_CHECK(ints[5] == 0 || ints[5] == 1,
             "layout: this build reads values of coding 0 (numbers) or 1 (plain), got ", ints[5]);
  head_dim_ = static_cast<int>(ints[2]);
  value_coding_ = static_cast<ValueCoding>(ints[5]);

  for (int64_t h = 0; h < num_heads; ++h) {
    const int64_t* counts = ints.data() + kLayoutHeader + h * kLayoutPerHead;
    const ValueLayout value = parse_value(counts[2 * kNumWidths], value_coding_, h, head_dim_);
    SVDQ_CHECK(value.packed() || h == 0 || value.bits == heads_[0].value.bits,
               "layout: exact values must have as many bits in every head, got ", value.bits,
               " in head ", h, " and ", heads_[0].value.bits, " in head 0");
    HeadPlan head{
        parse_bands(counts, h), parse_bands(counts + kNumWidths, h), rank_, k_page_bytes_, value,
        v_page_bytes_};
    SVDQ_CHECK((head.pre.rank() == 0 || rope_ != RopeMode::kPost) &&
                   (head.post.rank() == 0 || rope_ != RopeMode::kPre),
               "layout: head ", h, " has channels that its rope mode does not use");
    for (const int rank : {head.pre.rank(), head.post.rank()}) {
      SVDQ_CHECK(rank <= ints[2], "layout: head ", h, " codes ", rank, " channels of head_dim ",
                 ints[2]);
    }
    rank_ += head.rank();
    pre_rank_ += head.pre.rank();
    k_page_bytes_ += head.page_bytes();
    v_page_bytes_ += value.page_bytes();
    heads_.push_back(head);
    pre_heads_.push_back(
        {head.pre, Bands{}, head.first_channel, head.k_offset, value, head.v_offset});
    post_heads_.push_back(
        {Bands{}, head.post, head.first_post_channel(), head.post_offset(), value, head.v_offset});
  }
  SVDQ_CHECK(rank_ > 0, "layout: no head has a coded channel");
}

LayoutView Layout::view() const {
  return {num_heads(), head_dim_,     rope_,         value_coding_,
          rank_,       k_page_bytes_, v_page_bytes_, heads_.data()};
}

LayoutView Layout::pre_view() const {
  LayoutView pre = view();
  pre.rope = RopeMode::kPre;
  pre.heads = pre_heads_.data();
  return pre;
}

LayoutView Layout::post_view() const {
  LayoutView post = view();
  post.rope = RopeMode::kPost;
  post.heads = post_heads_.data();
  return post;
}

}  // namespace svdq
