// The gather stage: copies the codes of selected tokens into pages of their own.
//
// Per token, D = 128, 1.25-bit keys and 4-bit values: 12 lanes of keys, one scalar each, and 8 blocks of values,
// 5 vector operations each. Selected tokens lie anywhere, so the lines of a page are prefetched a page ahead.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "csrc/core/parallel.h"
#include "csrc/cpu/pages/bands-inl.h"
#include "csrc/cpu/pages/prefetch-inl.h"
#include "csrc/cpu/simd-inl.h"
#include "csrc/cpu/tasks-inl.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"
#include "kernels/params.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Address of the token of a slot.
struct TokenAddress {
  const uint8_t* keys;  // of its head in its page
  const uint8_t* values;
  int token;  // in the page; -1: no token
};

// Line of code tile (quad, group) of a band of keys, and the bit of the tile in its lanes.
template <int kWidth>
inline uint32_t key_line(uint32_t quad, uint32_t group) {
  return (quad * kGroups + group) / (8 / kWidth) * kLineBytes;
}
template <int kWidth>
inline uint32_t key_shift(uint32_t quad, uint32_t group) {
  return (quad * kGroups + group) % (8 / kWidth) * kWidth;
}

// Copies the codes of one band of keys for 64 tokens into `to`, which holds zeros.
template <int kWidth>
inline void gather_band(const TokenAddress* addresses, int64_t offset, int count, uint8_t* to) {
  constexpr uint32_t kMask = kWidth == 8 ? ~0u : ((1u << kWidth % 8) - 1) * 0x01010101u;
  // Quads this far apart have whole lines between them and the same bits of their lanes.
  constexpr uint32_t kStride = 8 / kWidth > kGroups ? 8 / kWidth / kGroups : 1;
  const uint32_t quads = static_cast<uint32_t>(count) / kQuad;
  for (uint32_t t = 0; t < kPageTokens; ++t) {
    if (addresses[t].token < 0) continue;
    const uint32_t token = static_cast<uint32_t>(addresses[t].token);
    const uint8_t* source = addresses[t].keys + offset + token % kLanes * kQuad;
    uint8_t* target = to + offset + t % kLanes * kQuad;
    for (uint32_t first = 0; first < kStride; ++first) {
      const uint8_t* from = source + key_line<kWidth>(first, token / kLanes);
      uint8_t* at = target + key_line<kWidth>(first, t / kLanes);
      const uint32_t down = key_shift<kWidth>(first, token / kLanes),
                     up = key_shift<kWidth>(first, t / kLanes);
      for (uint32_t quad = first; quad < quads; quad += kStride) {
        uint32_t lane, own;
        std::memcpy(&lane, from, 4);
        std::memcpy(&own, at, 4);
        own |= (lane >> down & kMask) << up;
        std::memcpy(at, &own, 4);
        from += key_line<kWidth>(kStride, 0);
        at += key_line<kWidth>(kStride, 0);
      }
    }
  }
}

inline void gather_keys(const HeadPlan& head, const TokenAddress* addresses, uint8_t* to) {
  std::memset(to, 0, head.page_bytes());
  int64_t offset = 0;
  for (const Bands* bands : {&head.pre, &head.post}) {
    for_each_band(*bands, [&]<int kWidth>(int count, int) {
      gather_band<kWidth>(addresses, offset, count, to);
      offset += band_bytes(kWidth, count);
    });
  }
}

// Copies one plane of the codes of packed values, which begins at `plane`, line by line: a line has 8 / kWidth code
// tiles, a tile a byte for each of four tokens.
template <int kWidth>
inline void gather_value_plane(const ValueLayout& value, int64_t plane,
                               const TokenAddress* addresses, uint8_t* to) {
  constexpr int kLineTokens = 8 / kWidth * kQuad;
  constexpr int kBlockBytes = kPageTokens / kLineTokens * kLineBytes;
  constexpr uint32_t kMask = (1u << kWidth) - 1;
  // Bit of a token's codes in a lane.
  const auto shift = [](int token) {
    return token % kQuad * 8 + token / kQuad % (8 / kWidth) * kWidth;
  };
  const int blocks = value.head_dim / kLanes;
  uint8_t* codes = to + plane;
  for (int first = 0; first < kPageTokens; first += kLineTokens) {
    const uint8_t* source[kLineTokens];
    int down[kLineTokens], up[kLineTokens], count = 0;
    for (int t = first; t < first + kLineTokens; ++t) {
      if (addresses[t].token < 0) continue;
      source[count] = addresses[t].values + plane + addresses[t].token / kLineTokens * kLineBytes;
      down[count] = shift(addresses[t].token);
      up[count++] = shift(t);
    }
    for (int block = 0; block < blocks; ++block) {
      const int64_t offset = int64_t{block} * kBlockBytes;
      for (int part = 0; part < kParts; ++part) {
        U32 line{};
        for (int i = 0; i < count; ++i) {
          const U32 lanes = load<U32>(source[i] + offset + part * kVecBytes);
          line |= (lanes >> down[i] & kMask) << up[i];
        }
        store(codes + offset + first / kLineTokens * kLineBytes + part * kVecBytes, line);
      }
    }
  }
}

inline void gather_values(const ValueLayout& value, const TokenAddress* addresses, uint8_t* to) {
  if (!value.packed()) {
    const int64_t bytes = int64_t{value.head_dim} * value.bits / 8;
    for (int t = 0; t < kPageTokens; ++t) {
      if (addresses[t].token < 0) {
        std::memset(to + t * bytes, 0, bytes);
      } else {
        std::memcpy(to + t * bytes, addresses[t].values + addresses[t].token * bytes, bytes);
      }
    }
    return;
  }
  for (int t = 0; t < kPageTokens; ++t)
    to[t] = addresses[t].token < 0 ? uint8_t{0} : addresses[t].values[addresses[t].token];
  const int64_t low = value.code_offset();
  if (value.bits == 4) gather_value_plane<4>(value, low, addresses, to);
  if (value.bits <= 3) gather_value_plane<2>(value, low, addresses, to);
  if (value.bits == 3) gather_value_plane<1>(value, value.high_plane_offset(), addresses, to);
}

// Prefetches the lines that hold a token.
inline void prefetch_codes(const HeadPlan& head, const TokenAddress& from) {
  if (from.token < 0) return;
  const ValueLayout& value = head.value;
  const uint32_t token = static_cast<uint32_t>(from.token);
  const uint8_t* lines = from.keys;
  for (const Bands* bands : {&head.pre, &head.post}) {
    for_each_band(*bands, [&]<int kWidth>(int count, int) {
      for (uint32_t quad = 0; quad < static_cast<uint32_t>(count) / kQuad; ++quad)
        prefetch_line(lines + key_line<kWidth>(quad, token / kLanes));
      lines += band_bytes(kWidth, count);
    });
  }
  if (!value.packed()) {
    const int64_t bytes = int64_t{value.head_dim} * value.bits / 8;
    const uint8_t* row = from.values + from.token * bytes;
    for (int64_t at = 0; at < bytes; at += kLineBytes) prefetch_line(row + at);
    return;
  }
  prefetch_line(from.values);  // scales
  const auto prefetch_plane = [&](int width, int64_t plane) {
    const int block_lines = kPageTokens * width / 32;  // 16 channels of 64 tokens
    const uint8_t* line = from.values + plane + token * width / 32 * kLineBytes;
    for (int block = 0; block < value.head_dim / kLanes; ++block, line += block_lines * kLineBytes)
      prefetch_line(line);
  };
  prefetch_plane(low_plane_width(value.bits), value.code_offset());
  if (value.bits == 3) prefetch_plane(1, value.high_plane_offset());
}

// Copies the codes of each list's tokens, page by page.
inline void gather(const GatherParams& p, const Executor& executor) {
  const LayoutView& layout = p.layout;
  const int64_t pages = ceil_div(p.num_slots, kPageTokens);
  const auto find = [&](int64_t b, int64_t h, int64_t page, TokenAddress* addresses) {
    const int32_t* slots = p.slots + (b * layout.num_heads + h) * p.num_slots;
    for (int t = 0; t < kPageTokens; ++t) {
      const int64_t i = page * kPageTokens + t;
      addresses[t] = {nullptr, nullptr, -1};
      if (i >= p.num_slots || slots[i] == kNoSlot) continue;
      const int64_t id = p.page_table[b * p.table_stride + slots[i] / kPageTokens];
      addresses[t] = {p.k_pages + id * layout.k_page_bytes + layout.heads[h].k_offset,
                      p.v_pages + id * layout.v_page_bytes + layout.heads[h].v_offset,
                      slots[i] % kPageTokens};
    }
  };
  // Visit all heads of a page, whose codes lie on the same pages of virtual memory. Each visit prefetches the lines of
  // the next.
  constexpr int64_t kChunkPages = 4;
  const int64_t chunks = ceil_div(pages, kChunkPages), heads = layout.num_heads;
  for_each_task(executor, p.batch * chunks, [&](int64_t task, int) {
    const int64_t b = task / chunks, first = task % chunks * kChunkPages;
    const int64_t visits = (std::min(first + kChunkPages, pages) - first) * heads;
    TokenAddress addresses[2][kPageTokens];
    find(b, 0, first, addresses[0]);
    for (int64_t visit = 0; visit < visits; ++visit) {
      const int64_t page = first + visit / heads, h = visit % heads, next = visit + 1;
      // Prefetch the tokens of the next visit.
      if (next < visits) {
        TokenAddress* ahead = addresses[next % 2];
        find(b, next % heads, first + next / heads, ahead);
        for (int t = 0; t < kPageTokens; ++t) prefetch_codes(layout.heads[next % heads], ahead[t]);
      }
      // Copy the codes of this page.
      const int64_t row = b * pages + page;
      gather_keys(layout.heads[h], addresses[visit % 2],
                  p.k_out + row * layout.k_page_bytes + layout.heads[h].k_offset);
      gather_values(layout.heads[h].value, addresses[visit % 2],
                    p.v_out + row * layout.v_page_bytes + layout.heads[h].v_offset);
    }
  });
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
