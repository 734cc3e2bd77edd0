#include "csrc/core/unpack.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "kernels/rotation.h"

namespace svdq {
namespace {

template <typename Fn>
void for_each(const Executor& executor, int64_t num_tasks, const Fn& fn) {
  executor.run(
      num_tasks, [](void* context, int64_t task, int) { (*static_cast<const Fn*>(context))(task); },
      const_cast<Fn*>(&fn));
}

// First byte of a token's page and its slot inside it.
struct Slot {
  const uint8_t* page;
  int token;
};

Slot find_slot(const UnpackParams& p, int64_t token, int64_t page_bytes) {
  const int64_t slot = p.slot + token;
  return {p.pages + p.page_table[slot / kPageTokens] * page_bytes,
          static_cast<int>(slot % kPageTokens)};
}

// Codes of one head and slot: fn(channel, code, width).
template <typename Fn>
void for_each_code(const HeadPlan& head, const uint8_t* codes, int token, const Fn& fn) {
  int channel = 0;
  for (const Bands* bands : {&head.pre, &head.post}) {
    for (int w = 0; w < kNumWidths; ++w) {
      const int width = kWidths[w];
      for (int j = 0; j < bands->count[w]; ++j) {
        fn(channel++, get_code(codes, key_code_address(width, j, token), width), width);
      }
      codes += band_bytes(width, int64_t{bands->count[w]});
    }
  }
}

// Numbers that are summed at once, in registers of any machine.
constexpr int kBlock = 8;

// key [D] = mean + sum of latents [rank] times rows [rank, D].
void add_rows(const float* mean, const double* latents, const double* rows, int rank, int dim,
              double* key) {
  for (int d = 0; d < dim; d += kBlock) {
    double sum[kBlock];
    for (int i = 0; i < kBlock; ++i) sum[i] = static_cast<double>(mean[d + i]);
    for (int j = 0; j < rank; ++j) {
      const double latent = latents[j];
      const double* row = rows + int64_t{j} * dim + d;
      for (int i = 0; i < kBlock; ++i) sum[i] += latent * row[i];
    }
    for (int i = 0; i < kBlock; ++i) key[d + i] = sum[i];
  }
}

// rotation: [cos (rotary_pairs) | sin (rotary_pairs)].
void rotate_forward(double* key, const double* rotation, int rotary_pairs) {
  for (int i = 0; i < rotary_pairs; ++i) {
    const double x = key[i], y = key[i + rotary_pairs], c = rotation[i],
                 s = rotation[rotary_pairs + i];
    key[i] = x * c - y * s;
    key[i + rotary_pairs] = y * c + x * s;
  }
}

// row [D] = Q^T row (kernels/rotation.h), by the definition.
void unrotate_values(double* row, int dim) {
  const int block = rotation_block(dim), blocks = dim / block;
  for (int j = 0; blocks > 1 && j < block; ++j) {
    double sum = 0;
    for (int i = 0; i < blocks; ++i) sum += row[i * block + j];
    for (int i = 0; i < blocks; ++i) row[i * block + j] -= 2 * sum / blocks;
  }
  for (int stride = 1; stride < block; stride *= 2) {
    for (int d = 0; d < dim; ++d) {
      if (d & stride) continue;
      const double a = row[d], b = row[d + stride];
      row[d] = a + b;
      row[d + stride] = a - b;
    }
  }
  const double norm = 1 / std::sqrt(static_cast<double>(block));
  for (int d = 0; d < dim; ++d) row[d] *= norm * static_cast<double>(rotation_sign(d));
}

}  // namespace

void unpack_codes(const UnpackCodesParams& params, const Executor& executor) {
  const UnpackParams& p = params.packed;
  for_each(executor, p.num_tokens, [&](int64_t t) {
    const Slot slot = find_slot(p, t, p.layout.k_page_bytes);
    for (int h = 0; h < p.layout.num_heads; ++h) {
      const HeadPlan& head = p.layout.heads[h];
      uint8_t* to = params.codes + t * p.layout.rank + head.first_channel;
      for_each_code(head, slot.page + head.k_offset, slot.token,
                    [&](int channel, int code, int) { to[channel] = static_cast<uint8_t>(code); });
    }
  });
}

void unpack_keys(const UnpackKeysParams& params, const Executor& executor) {
  const UnpackParams& p = params.packed;
  const KeyCodec& codec = params.codec;
  const Rope& rope = codec.rope;
  const int dim = p.layout.head_dim;
  const AlignedBuffer basis_rows(sizeof(double) * p.layout.rank * dim);
  double* rows = basis_rows.as<double>();
  for (int64_t i = 0; i < int64_t{p.layout.rank} * dim; ++i)
    rows[i] = static_cast<double>(bfloat16_to_float(codec.basis[i]));
  double step[kMaxHeadDim];
  start_rotation(rope, 1, step);

  const auto unpack_key = [&](int h, int64_t t, const Slot& slot, const double* rotation) {
    const HeadPlan& head = p.layout.heads[h];
    double latents[kMaxHeadDim], key[kMaxHeadDim];
    for_each_code(
        head, slot.page + head.k_offset, slot.token, [&](int channel, int code, int width) {
          const double mid = ((1 << width) - 1) / 2.0;
          latents[channel] =
              (code - mid) * static_cast<double>(codec.scale[head.first_channel + channel]);
        });
    add_rows(codec.mean + int64_t{h} * dim, latents, rows + int64_t{head.first_channel} * dim,
             head.rank(), dim, key);
    rotate_forward(key, rotation, rope.rotary_pairs);
    float* to = params.keys + (h * p.num_tokens + t) * dim;
    for (int d = 0; d < dim; ++d) to[d] = static_cast<float>(key[d]);
  };
  // A rotation computed afresh for each chunk of tokens; the products after it lose 1e-16 each.
  for_each(executor, page_count(p.num_tokens), [&](int64_t chunk) {
    double rotation[kMaxHeadDim];
    const int64_t first = chunk * kPageTokens;
    start_rotation(rope, params.position + first, rotation);
    for (int64_t t = first; t < std::min(first + kPageTokens, p.num_tokens); ++t) {
      const Slot slot = find_slot(p, t, p.layout.k_page_bytes);
      for (int h = 0; h < p.layout.num_heads; ++h) unpack_key(h, t, slot, rotation);
      advance_rotation(rotation, step, rope.rotary_pairs);
    }
  });
}

void unpack_values(const UnpackValuesParams& params, const Executor& executor) {
  const UnpackParams& p = params.packed;
  const int dim = p.layout.head_dim;
  for_each(executor, p.num_tokens, [&](int64_t t) {
    const Slot slot = find_slot(p, t, p.layout.v_page_bytes);
    for (int h = 0; h < p.layout.num_heads; ++h) {
      const ValueLayout& value = p.layout.heads[h].value;
      const uint8_t* page = slot.page + p.layout.heads[h].v_offset;
      float* to = params.values + (h * p.num_tokens + t) * dim;
      if (!value.packed()) {
        for (int d = 0; d < dim; ++d)
          to[d] = load_scalar(page, params.dtype, int64_t{slot.token} * dim + d);
        continue;
      }
      double rotated[kMaxHeadDim];
      const double mid = static_cast<double>(mid_code(value.bits));
      const double scale = static_cast<double>(half_to_float(scale_as_half(page[slot.token])));
      for (int d = 0; d < dim; ++d)
        rotated[d] = (get_value_code(page, value, d, slot.token) - mid) * scale;
      unrotate_values(rotated, dim);
      for (int d = 0; d < dim; ++d) to[d] = static_cast<float>(rotated[d]);
    }
  });
}

}  // namespace svdq
