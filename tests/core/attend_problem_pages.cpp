// The pages of an attend problem.
#include "tests/core/attend_problem.h"
#include "tests/core/page_pool.h"

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
  // Any byte is a code. Scales and uncompressed values must be finite in slots that are read; slots that
  // hold no token or a sink may hold anything, NaN included.
  k_pages_.resize((2 * pages + 1) * layout_.k_page_bytes());
  v_pages_.resize((2 * pages + 1) * layout_.v_page_bytes(), 0xff);
  random.fill(k_pages_);
  for (int b = 0; b < batch(); ++b) {
    for (int slot = skipped(); slot < cache_seqlens_[b]; ++slot) {
      for (int h = 0; h < num_heads(); ++h) {
        const HeadPlan& head = layout_.view().heads[h];
        uint8_t* page =
            &v_pages_[table_[b * table_stride_ + slot / kPageTokens] * layout_.v_page_bytes() +
                      head.v_offset];
        const int at = slot % kPageTokens;
        const bool filled = slot_of(b, h, slot) >= 0;  // a token without a slot is zeros
        if (head.value.packed()) {
          const double scale = filled ? random.integer(0, 20) * 0.02 : 0.0;
          page[at] = static_cast<uint8_t>(scale_byte(float_to_half(static_cast<float>(scale))));
        }
        for (int d = 0; d < c_.head_dim; ++d) {
          if (head.value.packed()) {
            const int top = (1 << head.value.bits) - 1;
            put_value_code(page, head.value, d, at, filled ? random.integer(0, top) : 0);
          } else {
            write_number(page + (at * c_.head_dim + d) * head.value.bits / 8, c_.window_dtype,
                         filled ? random.normal() : 0.0);
          }
        }
      }
    }
  }
}

}  // namespace svdq::testing
