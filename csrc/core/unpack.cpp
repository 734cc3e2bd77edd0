#include "csrc/core/unpack.h"

#include <initializer_list>

#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"

namespace svdq {
namespace {

template <typename Fn>
void for_each_token(const Executor& executor, int64_t num_tokens, const Fn& fn) {
  executor.run(
      num_tokens,
      [](void* context, int64_t token, int) { (*static_cast<const Fn*>(context))(token); },
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
  for (const Bands* bands : {&head.core, &head.tail}) {
    for (int w = 0; w < kNumWidths; ++w) {
      const int width = kWidths[w];
      for (int j = 0; j < bands->count[w]; ++j) {
        fn(channel++, get_code(codes, key_code_place(width, j, token), width), width);
      }
      codes += int64_t{bands->count[w]} * width * kPageTokens / 8;
    }
  }
}

void rotate_forward(float* key, const Rope& rope, const double* rotation) {
  for (int i = 0; i < rope.half; ++i) {
    const double x = key[i], y = key[i + rope.half], c = rotation[i], s = rotation[rope.half + i];
    key[i] = static_cast<float>(x * c - y * s);
    key[i + rope.half] = static_cast<float>(y * c + x * s);
  }
}

}  // namespace

void unpack_codes(const UnpackParams& p, const Executor& executor, uint8_t* codes) {
  for_each_token(executor, p.num_tokens, [&](int64_t t) {
    const Slot slot = find_slot(p, t, p.layout.k_page_bytes);
    for (int h = 0; h < p.layout.num_heads; ++h) {
      const HeadPlan& head = p.layout.heads[h];
      uint8_t* to = codes + t * p.layout.rank + head.first_channel;
      for_each_code(head, slot.page + head.k_offset, slot.token,
                    [&](int channel, int code, int) { to[channel] = static_cast<uint8_t>(code); });
    }
  });
}

void unpack_keys(const UnpackParams& p, const Executor& executor, const Rope& rope,
                 int64_t position, const uint16_t* basis, const float* scale, const float* mean,
                 float* keys) {
  const int dim = p.layout.head_dim;
  for_each_token(executor, p.num_tokens, [&](int64_t t) {
    const Slot slot = find_slot(p, t, p.layout.k_page_bytes);
    double rotation[kMaxHeadDim];
    if (rope.half > 0) start_rotation(rope, position + t, rotation);
    for (int h = 0; h < p.layout.num_heads; ++h) {
      const HeadPlan& head = p.layout.heads[h];
      double key[kMaxHeadDim];
      for (int d = 0; d < dim; ++d) key[d] = mean[h * dim + d];
      for_each_code(
          head, slot.page + head.k_offset, slot.token, [&](int channel, int code, int width) {
            const int64_t j = head.first_channel + channel;
            const double latent = (code - ((1 << width) - 1) / 2.0) * static_cast<double>(scale[j]);
            for (int d = 0; d < dim; ++d)
              key[d] += latent * static_cast<double>(bfloat16_to_float(basis[j * dim + d]));
          });
      float* to = keys + (h * p.num_tokens + t) * dim;
      for (int d = 0; d < dim; ++d) to[d] = static_cast<float>(key[d]);
      rotate_forward(to, rope, rotation);
    }
  });
}

void unpack_values(const UnpackParams& p, const Executor& executor, DataType dtype, float* values) {
  const ValueLayout& value = p.layout.value;
  const int dim = p.layout.head_dim;
  for_each_token(executor, p.num_tokens, [&](int64_t t) {
    const Slot slot = find_slot(p, t, p.layout.v_page_bytes);
    for (int h = 0; h < p.layout.num_heads; ++h) {
      const uint8_t* page = slot.page + h * value.page_bytes();
      float* to = values + (h * p.num_tokens + t) * dim;
      for (int d = 0; d < dim; ++d) {
        if (!value.packed()) {
          to[d] = load_scalar(page, dtype, int64_t{slot.token} * dim + d);
          continue;
        }
        const int64_t at = int64_t{d / value.group_size} * kPageTokens + slot.token;
        const float scale = load_scalar(page + value.scale_offset(), DataType::kFloat16, at);
        const float zero = load_scalar(page + value.zero_offset(), DataType::kFloat16, at);
        const int code = get_code(page + value.code_offset(),
                                  value_code_place(value.bits, d, slot.token), value.bits);
        to[d] = zero + static_cast<float>(code) * scale;
      }
    }
  });
}

}  // namespace svdq
