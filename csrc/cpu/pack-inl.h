// The pack stage: latents and values become codes in the quad layout.

// Pages that one task packs, so that its transposed basis is used more than once.
inline constexpr int64_t kPagesPerTask = 16;

// Slots first .. first + count - 1 of a page are written; they hold tokens token .. token + count
// - 1.
struct PageSpan {
  int64_t page;  // row of the pool
  int64_t run;   // page of the sequence, counted from the first one written
  int64_t token;
  int first;
  int count;

  bool full() const { return count == kPageTokens; }
  uint64_t mask() const {
    return (count == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << count) - 1) << first;
  }
};

inline PageSpan page_span(const int32_t* page_table, int64_t slot, int64_t num_tokens,
                          int64_t run) {
  const int64_t begin = std::max(slot, (slot / kPageTokens + run) * kPageTokens);
  const int64_t end = std::min(slot + num_tokens, (slot / kPageTokens + run + 1) * kPageTokens);
  return {page_table[slot / kPageTokens + run], run, begin - slot,
          static_cast<int>(begin % kPageTokens), static_cast<int>(end - begin)};
}

inline int64_t spanned_pages(int64_t slot, int64_t num_tokens) {
  return num_tokens == 0 ? 0 : (slot + num_tokens - 1) / kPageTokens - slot / kPageTokens + 1;
}

// Codes of one band, [count, 64] int32 by channel, into its lines; bits of slots outside the span
// stay.
template <int kWidth>
inline void write_band(const int32_t* codes, int count, const PageSpan& span, uint8_t* lines) {
  constexpr int kUnits = 8 / kWidth;  // units in a line
  constexpr uint32_t kUnitMask = ((1u << kWidth) - 1) * 0x01010101u;
  const int num_lines = count * kGroups / kQuad / kUnits;
  for (int line = 0; line < num_lines; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{}, keep{};
      for (int k = 0; k < kUnits; ++k) {
        const int unit = line * kUnits + k, quad = unit / kGroups;
        const int token = unit % kGroups * kLanes + part * kVecLanes;
        U32 lane{};
        for (int e = 0; e < kQuad; ++e) {
          lane |= load<U32>(codes + (quad * kQuad + e) * kPageTokens + token) << (8 * e);
        }
        bits |= lane << (k * kWidth);
        const U32 kept = (U32)select_lanes(static_cast<uint32_t>(~span.mask() >> token),
                                           (F32)splat_u32(kUnitMask), F32{});
        keep |= kept << (k * kWidth);
      }
      if (!span.full()) bits = (bits & ~keep) | (load<U32>(to) & keep);
      store(to, bits);
    }
  }
}

inline void write_codes(const HeadPlan& head, const int32_t* codes, const PageSpan& span,
                        uint8_t* lines) {
  for (const Bands* bands : {&head.core, &head.tail}) {
    for_each_band(*bands, [&]<int kWidth>(int count, int) {
      write_band<kWidth>(codes, count, span, lines);
      codes += count * kPageTokens;
      lines += count * kWidth * kPageTokens / 8;
    });
  }
}

// rows -= what the codes [rank, 64] of `span` stand for; then the squared length of each row.
// basis_rows [rank, D] and latent are scratch.
inline void write_errors(const PackKeysParams& p, const HeadPlan& head, int h, const PageSpan& span,
                         const int32_t* codes, float* basis_rows, float* latent, float* rows) {
  const int rank = head.rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const uint16_t* basis = p.basis + int64_t{head.first_channel} * dim;
  for (int64_t i = 0; i < int64_t{rank} * dim; i += kVecLanes)
    store(basis_rows + i, load_bfloat16(basis + i));
  for (int j = 0; j < rank; ++j) {
    const float mid = static_cast<float>((1 << channel_width(head, j)) - 1) / 2;
    for (int r = 0; r < span.count; ++r) {
      latent[r * padded + j] = (mid - static_cast<float>(codes[j * kPageTokens + span.first + r])) *
                               p.scale[head.first_channel + j];
    }
  }
  for (int d = 0; d < dim; d += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((dim - d) / kVecLanes, [&]<int kVecs>() {
      for (int t = 0; t < span.count; t += kTileTokens) {
        outer_product_tile<kVecs, true>(latent + t * padded, padded, 1, basis_rows + d, dim, rank,
                                        rows + t * dim + d, dim);
      }
    });
  }
  for (int r = 0; r < span.count; ++r) {
    F32 sum{};
    for (int d = 0; d < dim; d += kVecLanes) {
      const F32 x = load<F32>(rows + r * dim + d);
      sum += x * x;
    }
    p.errors[h * p.errors_stride + span.token + r] = reduce_add(sum);
  }
}

inline void pack_keys(const PackKeysParams& p, const Executor& executor) {
  const LayoutView& layout = p.layout;
  const int64_t num_pages = spanned_pages(p.slot, p.keys.num_tokens);
  const int64_t chunks = (num_pages + kPagesPerTask - 1) / kPagesPerTask;
  const RopeTable table(p.rope, p.position - p.slot % kPageTokens, num_pages);
  const int64_t dim = layout.head_dim, padded = padded_rank(static_cast<int>(dim));
  const int64_t worker_size =
      kPageTokens * dim + 2 * kPageTokens * padded + dim * padded + (p.errors ? dim * dim : 0);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);

  for_each_task(executor, layout.num_heads * chunks, [&](int64_t task, int worker) {
    const HeadPlan& head = layout.heads[task / chunks];
    const int h = static_cast<int>(task / chunks), rank = head.rank();
    if (rank == 0 && !p.errors) return;
    float* rows = scratch.as<float>() + worker * worker_size;
    float* latent = rows + kPageTokens * dim;
    int32_t* codes = reinterpret_cast<int32_t*>(latent + kPageTokens * padded);
    float* columns = reinterpret_cast<float*>(codes + kPageTokens * padded);
    transpose_basis(p.basis + int64_t{head.first_channel} * dim, rank, static_cast<int>(dim),
                    columns);

    const int64_t first = task % chunks * kPagesPerTask;
    for (int64_t run = first; run < std::min(first + kPagesPerTask, num_pages); ++run) {
      const PageSpan span = page_span(p.page_table, p.slot, p.keys.num_tokens, run);
      load_rows(p.keys, h, static_cast<int>(dim), span.token, span.count, table, run, span.first,
                p.mean + h * dim, rows);
      project_rows(rows, columns, rank, static_cast<int>(dim), latent);
      // Row r of the latents is slot first + r; codes are stored by slot.
      for (int j = 0; j < rank; ++j) {
        const float scale = p.scale[head.first_channel + j];
        const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
        const int top = (1 << channel_width(head, j)) - 1;
        const float mid = static_cast<float>(top) / 2;
        int32_t* to = codes + j * kPageTokens;
        std::memset(to, 0, sizeof(int32_t) * kPageTokens);
        for (int r = 0; r < span.count; ++r) {
          const float code = std::nearbyintf(latent[r * padded_rank(rank) + j] * inverse + mid);
          // In this order a latent that overflowed to NaN becomes code 0.
          to[span.first + r] =
              static_cast<int32_t>(std::min(std::max(0.0f, code), static_cast<float>(top)));
        }
      }
      write_codes(head, codes, span, p.pages + span.page * layout.k_page_bytes + head.k_offset);
      if (p.errors) write_errors(p, head, h, span, codes, columns + dim * padded, latent, rows);
    }
  });
}

// Scale and zero point of one token's group, rounded to half.
struct ValueGroup {
  uint16_t scale;
  uint16_t zero;
};

inline ValueGroup fit_value_group(const float* row, int group_size, int width) {
  F32 low = load<F32>(row), high = low;
  for (int d = kVecLanes; d < group_size; d += kVecLanes) {
    low = min(low, load<F32>(row + d));
    high = max(high, load<F32>(row + d));
  }
  const float least = -reduce_max(-low), most = reduce_max(high);
  return {float_to_half((most - least) / static_cast<float>((1 << width) - 1)),
          float_to_half(least)};
}

template <int kWidth>
inline void pack_value_page(const PackValuesParams& p, int h, const PageSpan& span, float* rows,
                            uint8_t* page) {
  constexpr int kUnits = 8 / kWidth;
  constexpr uint32_t kUnitMask = (1u << kWidth) - 1;
  const ValueLayout& value = p.layout.value;
  const int dim = value.head_dim;
  uint16_t* scales = reinterpret_cast<uint16_t*>(page + value.scale_offset());
  uint16_t* zeros = reinterpret_cast<uint16_t*>(page + value.zero_offset());
  // Rows by slot, replaced by their codes as floats.
  for (int r = 0; r < span.count; ++r) {
    float* row = rows + (span.first + r) * dim;
    const int64_t from = h * p.values.head_stride + (span.token + r) * p.values.token_stride;
    for (int d = 0; d < dim; d += kVecLanes)
      store(row + d, load_as_float(p.values.data, p.values.dtype, from + d));
    for (int g = 0; g < value.groups(); ++g) {
      const ValueGroup group =
          fit_value_group(row + g * value.group_size, value.group_size, kWidth);
      scales[g * kPageTokens + span.first + r] = group.scale;
      zeros[g * kPageTokens + span.first + r] = group.zero;
      const float scale = half_to_float(group.scale), zero = half_to_float(group.zero);
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      for (int d = g * value.group_size; d < (g + 1) * value.group_size; d += kVecLanes) {
        const F32 code = round_even((load<F32>(row + d) - zero) * inverse);
        store(row + d, min(max(code, F32{}), splat(static_cast<float>(kUnitMask))));
      }
    }
  }
  uint8_t* lines = page + value.code_offset();
  for (int line = 0; line < dim / kLanes * kTokenQuads / kUnits; ++line) {
    for (int part = 0; part < kParts; ++part) {
      uint8_t* to = lines + line * kLineBytes + part * kVecBytes;
      U32 bits{};
      uint32_t keep = 0;
      for (int k = 0; k < kUnits; ++k) {
        const int unit = line * kUnits + k;
        const int channel = unit / kTokenQuads * kLanes + part * kVecLanes;
        for (int e = 0; e < kQuad; ++e) {
          const int slot = unit % kTokenQuads * kQuad + e;
          if (slot < span.first || slot >= span.first + span.count) {
            keep |= kUnitMask << (8 * e + k * kWidth);
          } else {
            bits |= (U32)round_to_int(load<F32>(rows + slot * dim + channel))
                    << (8 * e + k * kWidth);
          }
        }
      }
      if (keep) bits |= load<U32>(to) & keep;
      store(to, bits);
    }
  }
}

inline void copy_value_page(const PackValuesParams& p, int h, const PageSpan& span, uint8_t* page) {
  const int64_t size = p.layout.value.bits / 8;
  for (int r = 0; r < span.count; ++r) {
    const int64_t from = h * p.values.head_stride + (span.token + r) * p.values.token_stride;
    std::memcpy(page + int64_t{span.first + r} * p.layout.head_dim * size,
                static_cast<const uint8_t*>(p.values.data) + from * size, p.layout.head_dim * size);
  }
}

inline void pack_values(const PackValuesParams& p, const Executor& executor) {
  const int64_t num_pages = spanned_pages(p.slot, p.values.num_tokens);
  const int64_t worker_size = int64_t{kPageTokens} * p.layout.head_dim;
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);
  for_each_task(executor, p.layout.num_heads * num_pages, [&](int64_t task, int worker) {
    const int h = static_cast<int>(task / num_pages);
    const PageSpan span = page_span(p.page_table, p.slot, p.values.num_tokens, task % num_pages);
    uint8_t* page = p.pages + span.page * p.layout.v_page_bytes + h * p.layout.value.page_bytes();
    float* rows = scratch.as<float>() + worker * worker_size;
    if (p.layout.value.bits == 4) {
      pack_value_page<4>(p, h, span, rows, page);
    } else if (p.layout.value.bits == 2) {
      pack_value_page<2>(p, h, span, rows, page);
    } else {
      copy_value_page(p, h, span, page);
    }
  });
}
