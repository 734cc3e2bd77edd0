// Copies what pages hold of selected tokens into pages of their own, code by code: tokens of an
// output page come from anywhere, each head's from elsewhere.
//
// A thread writes whole lanes of 4 bytes, each once: of keys 4 channels of the tokens that share the
// lane (1, 2, 4 or 8 by width), of values 4 tokens of a channel. Neighbouring threads write
// neighbouring lanes. Reads are the 4-byte lanes that hold the codes, of which memory gives 32-byte
// sectors: a token of 8 quads at 4 bits, 4 at 2 bits and 128 values of 4 bits costs 12 sectors of
// keys, 16 of values and one of its scale, 0.9 KiB where its codes are 85 bytes. That is what a
// format for whole pages costs, and little next to the pages that are not read.
#pragma once

#include "kernels/pages/heads.cuh"
#include "kernels/pages/code_fragments.cuh"

namespace svdq::device {

inline constexpr int kGatherThreads = 256;

// Sources of the tokens of an output page: page of the pool and slot there, a page of -1 for none.
struct GatherPlan {
  int64_t page[kPageTokens];
  int slot[kPageTokens];
};

class GatherBlock {
 public:
  SVDQ_DEVICE GatherBlock(const GatherPlan& s, const GatherParams& p, const HeadPlan& head)
      : s_(s), p_(p), head_(head), out_(int64_t{block_z()} * grid_x() + block_x()) {}

  // Keys of one band: `offset` is where it begins in a page.
  template <int kWidth>
  SVDQ_DEVICE void keys(int64_t offset, int count) const {
    constexpr int kUnits = 8 / kWidth;
    constexpr uint32_t kMask = ((1u << kWidth) - 1) * 0x01010101u;
    uint8_t* to = p_.k_out + out_ * p_.layout.k_page_bytes + offset;
    const int lanes = band_bytes(kWidth, count) / 4;
    for (int i = thread_index(); i < lanes; i += kGatherThreads) {
      uint32_t lane = 0;
      SVDQ_UNROLL
      for (int k = 0; k < kUnits; ++k) {
        const int unit = i / kLanes * kUnits + k;
        const int token = unit % kGroups * kLanes + i % kLanes;
        const int64_t page = load(&s_.page[token]);
        if (page < 0) continue;
        const int slot = load(&s_.slot[token]);
        const CodeAddress place =
            code_tile_address(kWidth, unit / kGroups * kGroups + slot / kLanes, slot % kLanes, 0);
        const uint8_t* from = p_.k_pages + page * p_.layout.k_page_bytes + offset + place.byte;
        const uint32_t codes = load(reinterpret_cast<const uint32_t*>(from)) >> place.shift;
        lane |= (codes & kMask) << (k * kWidth);
      }
      store(reinterpret_cast<uint32_t*>(to) + i, lane);
    }
  }

  // One plane of the codes of packed values, which begins at `plane` in the head's page.
  template <int kWidth>
  SVDQ_DEVICE void value_plane(int64_t plane) const {
    constexpr int kUnits = 8 / kWidth;
    const int64_t offset = head_.v_offset + plane;
    uint8_t* to = p_.v_out + out_ * p_.layout.v_page_bytes + offset;
    const int lanes = band_bytes(kWidth, p_.layout.head_dim) / 4;
    for (int i = thread_index(); i < lanes; i += kGatherThreads) {
      uint32_t lane = 0;
      SVDQ_UNROLL
      for (int k = 0; k < kUnits; ++k) {
        const int unit = i / kLanes * kUnits + k;
        const int channel = unit / kTokenQuads * kLanes + i % kLanes;
        SVDQ_UNROLL
        for (int e = 0; e < kQuad; ++e) {
          const int token = unit % kTokenQuads * kQuad + e;
          const int64_t page = load(&s_.page[token]);
          if (page < 0) continue;
          const CodeAddress place = value_code_address(kWidth, channel, load(&s_.slot[token]));
          const int code = load(p_.v_pages + page * p_.layout.v_page_bytes + offset + place.byte);
          const uint32_t bits = static_cast<uint32_t>(code >> place.shift & ((1 << kWidth) - 1));
          lane |= bits << (8 * e + k * kWidth);
        }
      }
      store(reinterpret_cast<uint32_t*>(to) + i, lane);
    }
  }

  // Scales of four tokens at a time.
  SVDQ_DEVICE void value_scales() const {
    uint8_t* to = p_.v_out + out_ * p_.layout.v_page_bytes + head_.v_offset;
    if (thread_index() >= kTokenQuads) return;
    uint32_t quad = 0;
    SVDQ_UNROLL
    for (int e = 0; e < kQuad; ++e) {
      const int token = thread_index() * kQuad + e;
      const int64_t page = load(&s_.page[token]);
      if (page < 0) continue;
      const uint8_t* from = p_.v_pages + page * p_.layout.v_page_bytes + head_.v_offset;
      quad |= uint32_t{load(&from[load(&s_.slot[token])])} << (8 * e);
    }
    store(reinterpret_cast<uint32_t*>(to) + thread_index(), quad);
  }

  // Exact values, 16 bytes at a time.
  SVDQ_DEVICE void window_values() const {
    const int row = static_cast<int>(head_.value.page_bytes()) / kPageTokens;
    uint8_t* to = p_.v_out + out_ * p_.layout.v_page_bytes + head_.v_offset;
    for (int i = thread_index(); i < kPageTokens * (row / 16); i += kGatherThreads) {
      const int token = i / (row / 16), piece = i % (row / 16);
      const int64_t page = load(&s_.page[token]);
      Words4 words{};
      if (page >= 0) {
        const uint8_t* from = p_.v_pages + page * p_.layout.v_page_bytes + head_.v_offset +
                              load(&s_.slot[token]) * row + piece * 16;
        words = load(reinterpret_cast<const Words4*>(from));
      }
      store(reinterpret_cast<Words4*>(to) + i, words);
    }
  }

 private:
  const GatherPlan& s_;
  const GatherParams& p_;
  const HeadPlan& head_;
  int64_t out_;
};

// Grid: x = output page of the sequence, y = head, z = sequence.
SVDQ_KERNEL(kGatherThreads)
gather_kernel(GatherParams p, HeadTable heads) {
  GatherPlan& s = shared_memory<GatherPlan>();
  const HeadPlan head = head_plan(heads, block_y());
  if (thread_index() < kPageTokens) {
    const int64_t token = int64_t{block_x()} * kPageTokens + thread_index();
    const int64_t list = (int64_t{block_z()} * p.layout.num_heads + block_y()) * p.num_slots;
    const int slot = token < p.num_slots ? load(&p.slots[list + token]) : -1;
    int64_t page = -1;
    if (slot >= 0 && slot / kPageTokens < p.table_stride)
      page = load(&p.page_table[block_z() * p.table_stride + slot / kPageTokens]);
    store(&s.page[thread_index()], page < p.num_pages ? page : -1);
    store(&s.slot[thread_index()], slot % kPageTokens);
  }
  sync_threads();

  const GatherBlock block(s, p, head);
  int64_t offset = head.k_offset;
  for (int part = 0; part < 2; ++part) {
    Bands bands;
    SVDQ_UNROLL
    for (int w = 0; w < kNumWidths; ++w)
      bands.count[w] = part == 0 ? head.pre.count[w] : head.post.count[w];
    for_each_band(bands, [&]<int kWidth>(int count) {
      block.template keys<kWidth>(offset, count);
      offset += band_bytes(kWidth, count);
    });
  }
  if (!p.layout.packs_values()) {
    block.window_values();
    return;
  }
  block.value_scales();
  for_each_plane(head.value, [&]<int kWidth, int>(int64_t plane) {
    block.template value_plane<kWidth>(plane);
  });
}

inline LaunchShape gather_launch(const GatherParams& p) {
  return {static_cast<int>(page_count(p.num_slots)), p.layout.num_heads, p.batch, kGatherThreads,
          static_cast<int>(sizeof(GatherPlan))};
}

}  // namespace svdq::device
