// The pages of an attend problem.
#include "tests/core/attend_problem.h"

namespace svdq::testing {

// Ascending with gaps small and large; lists differ in length and may be empty.
void AttendProblem::make_token_slots(Random& random) {
  table_stride_ = *std::max_element(cache_seqlens_.begin(), cache_seqlens_.end()) / kPageTokens + 3;
  const int64_t room = table_stride_ * kPageTokens;
  token_slots_.assign(batch() * num_heads() * room, kNoSlot);
  for (int64_t list = 0; list < int64_t{batch()} * num_heads(); ++list) {
    const int length = cache_seqlens_[list / num_heads()];
    const int count = list % 3 == 0 ? length : random.integer(0, length);
    int slot = random.integer(0, 50);
    for (int i = 0; i < count; ++i) {
      token_slots_[list * room + i] = slot;
      slot += random.integer(0, 9) ? random.integer(1, 3) : random.integer(1, 20000);
    }
  }
}

int64_t AttendProblem::slot_of(int b, int h, int token) const {
  if (!c_.gathered) return token;
  const int64_t list = int64_t{b} * num_heads() + h;
  const int32_t slot = token_slots_[list * table_stride_ * kPageTokens + token];
  return slot == kNoSlot ? -1 : slot;
}

// Lists differ in length and contain sinks and slots past the end too. Keys behind a list are NaN.
void AttendProblem::make_outliers(Random& random) {
  outlier_room_ = c_.outliers + 2;
  const int64_t rows = int64_t{batch()} * num_heads() * outlier_room_;
  outlier_slots_.assign(rows, kNoSlot);
  outlier_keys_.assign(rows * c_.head_dim * size_of(c_.window_dtype), 0xff);
  for (int64_t list = 0; list < int64_t{batch()} * num_heads(); ++list) {
    const int b = static_cast<int>(list / num_heads()), h = static_cast<int>(list % num_heads());
    int reach = cache_seqlens_[b] + 5;
    if (c_.gathered) {  // only tokens that have a slot
      for (reach = 0; reach < cache_seqlens_[b] && slot_of(b, h, reach) >= 0;) ++reach;
    }
    std::vector<int32_t> slots(reach);
    std::iota(slots.begin(), slots.end(), 0);
    for (int i = 0; i < reach; ++i) std::swap(slots[i], slots[random.integer(i, reach - 1)]);
    slots.resize(std::min<int64_t>(reach, c_.outliers - list % 2));
    std::sort(slots.begin(), slots.end());
    std::copy(slots.begin(), slots.end(), outlier_slots_.begin() + list * outlier_room_);
    uint8_t* key = &outlier_keys_[list * outlier_room_ * c_.head_dim * size_of(c_.window_dtype)];
    for (size_t i = 0; i < slots.size() * c_.head_dim; ++i, key += size_of(c_.window_dtype))
      write_number(key, c_.window_dtype, random.normal());
  }
}

int64_t AttendProblem::outlier_at(int b, int h, int slot) const {
  const int64_t list = (int64_t{b} * num_heads() + h) * outlier_room_;
  for (int64_t i = list; i < list + outlier_room_; ++i)
    if (outlier_slots_[i] == slot) return i * c_.head_dim;
  return -1;
}

void AttendProblem::make_pages(Random& random) {
  // Pages lie scattered in a pool; entries after a sequence's last page are invalid.
  table_stride_ = *std::max_element(cache_seqlens_.begin(), cache_seqlens_.end()) / kPageTokens + 3;
  table_.assign(batch() * table_stride_, std::numeric_limits<int32_t>::max());
  int32_t pages = 0;
  for (int b = 0; b < batch(); ++b) {
    for (int64_t n = 0; n * kPageTokens < cache_seqlens_[b]; ++n)
      table_[b * table_stride_ + n] = pages++;
  }
  for (int32_t& page : table_) {
    if (page < pages) page = 2 * (pages - 1 - page) + 1;
  }
  // Any byte is a code. Scales, zero points and uncompressed values must be finite in slots that are read; slots that
  // hold no token or a sink may hold anything, NaN included.
  k_pages_.resize((2 * pages + 1) * layout_.k_page_bytes());
  v_pages_.resize((2 * pages + 1) * layout_.v_page_bytes(), 0xff);
  random.fill(k_pages_);
  const ValueLayout& value = layout_.value();
  for (int b = 0; b < batch(); ++b) {
    for (int slot = c_.sink_tokens; slot < cache_seqlens_[b]; ++slot) {
      for (int h = 0; h < num_heads(); ++h) {
        uint8_t* page =
            &v_pages_[table_[b * table_stride_ + slot / kPageTokens] * layout_.v_page_bytes() +
                      h * value.page_bytes()];
        const int at = slot % kPageTokens;
        if (slot_of(b, h, slot) < 0) {
          write_zeros(page, at);
          continue;
        }
        for (int g = 0; g < value.groups(); ++g) {
          write_number(page + value.scale_offset() + (g * kPageTokens + at) * 2, DataType::kFloat16,
                       random.integer(0, 20) * 0.02);
          write_number(page + value.zero_offset() + (g * kPageTokens + at) * 2, DataType::kFloat16,
                       random.normal());
        }
        for (int d = 0; d < c_.head_dim; ++d) {
          if (value.packed()) {
            put_code(page + value.code_offset(), value_code_address(value.bits, d, at), value.bits,
                     random.integer(0, (1 << value.bits) - 1));
          } else {
            write_number(page + (at * c_.head_dim + d) * value.bits / 8, c_.window_dtype,
                         random.normal());
          }
        }
      }
    }
  }
}

// The value of a token without a slot.
void AttendProblem::write_zeros(uint8_t* page, int at) const {
  const ValueLayout& value = layout_.value();
  for (int g = 0; g < value.groups(); ++g) {
    for (int64_t offset : {value.scale_offset(), value.zero_offset()})
      write_number(page + offset + (g * kPageTokens + at) * 2, DataType::kFloat16, 0);
  }
  for (int d = 0; d < c_.head_dim; ++d) {
    if (value.packed()) {
      put_code(page + value.code_offset(), value_code_address(value.bits, d, at), value.bits, 0);
    } else {
      write_number(page + (at * c_.head_dim + d) * value.bits / 8, c_.window_dtype, 0);
    }
  }
}

}  // namespace svdq::testing
