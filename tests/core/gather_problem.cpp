#include "tests/core/gather_problem.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/core/page_pool.h"
#include "tests/core/reference.h"

namespace svdq::testing {

GatherProblem::GatherProblem(const GatherCase& c, uint64_t stream)
    : c_(c), layout_(layout_ints(c.rope, c.head_dim, c.bands, c.v_bits, c.pre_bands)) {
  Random random(stream);
  const int heads = layout_.num_heads(), stored = c.num_pages * kPageTokens;
  // Lists fill their room, end before it, or are empty.
  slots_.assign(int64_t{c.batch} * heads * c.num_slots, kNoSlot);
  for (int64_t list = 0; list < int64_t{c.batch} * heads; ++list) {
    std::vector<int32_t> all(stored);
    std::iota(all.begin(), all.end(), 0);
    for (int i = 0; i < stored; ++i) std::swap(all[i], all[random.integer(i, stored - 1)]);
    const int max_count = std::min(stored, c.num_slots);
    all.resize(list % 3 == 0 ? max_count : random.integer(0, max_count));
    std::sort(all.begin(), all.end());
    std::copy(all.begin(), all.end(), slots_.begin() + list * c.num_slots);
  }

  // Pages lie scattered in a pool, between unused ones.
  const int pages = c.batch * c.num_pages;
  for (int i = 0; i < pages; ++i) table_.push_back(2 * (pages - 1 - i) + 1);
  k_pages_.resize((2 * pages + 1) * layout_.k_page_bytes());
  v_pages_.resize((2 * pages + 1) * layout_.v_page_bytes());
  random.fill(k_pages_);
  random.fill(v_pages_);
}

GatherParams GatherProblem::params() {
  k_out.assign(c_.batch * out_pages() * layout_.k_page_bytes(), 0xff);
  v_out.assign(c_.batch * out_pages() * layout_.v_page_bytes(), 0xff);
  GatherParams p{};
  p.layout = layout_.view();
  p.batch = c_.batch;
  p.k_pages = k_pages_.data();
  p.v_pages = v_pages_.data();
  p.num_pages = static_cast<int64_t>(2 * table_.size() + 1);
  p.page_table = table_.data();
  p.table_stride = c_.num_pages;
  p.slots = slots_.data();
  p.num_slots = c_.num_slots;
  p.k_out = k_out.data();
  p.v_out = v_out.data();
  return p;
}

template <typename Fn>
void GatherProblem::for_each_slot(const Fn& fn) const {
  for (int b = 0; b < c_.batch; ++b) {
    for (int h = 0; h < layout_.num_heads(); ++h) {
      for (int i = 0; i < c_.num_slots; ++i) {
        const int slot = slots_[(int64_t{b} * layout_.num_heads() + h) * c_.num_slots + i];
        if (slot == kNoSlot) continue;
        fn(h, int64_t{table_[b * c_.num_pages + slot / kPageTokens]}, slot % kPageTokens,
           b * out_pages() + i / kPageTokens, i % kPageTokens);
      }
    }
  }
}

std::vector<uint8_t> GatherProblem::expected_keys() const {
  std::vector<uint8_t> out(c_.batch * out_pages() * layout_.k_page_bytes());
  for_each_slot([&](int h, int64_t from, int slot, int64_t to, int token) {
    for (const reference::Channel& c : reference::channels_of(layout_.view().heads[h])) {
      const uint8_t* page = &k_pages_[from * layout_.k_page_bytes()];
      put_code(&out[to * layout_.k_page_bytes()], c.address(token), c.width,
               get_code(page, c.address(slot), c.width));
    }
  });
  return out;
}

std::vector<uint8_t> GatherProblem::expected_values() const {
  std::vector<uint8_t> out(c_.batch * out_pages() * layout_.v_page_bytes());
  for_each_slot([&](int h, int64_t from, int slot, int64_t to, int token) {
    const HeadPlan& head = layout_.view().heads[h];
    const ValueLayout& value = head.value;
    const uint8_t* page = &v_pages_[from * layout_.v_page_bytes() + head.v_offset];
    uint8_t* target = &out[to * layout_.v_page_bytes() + head.v_offset];
    if (!value.packed()) {
      const int row = value.head_dim * value.bits / 8;
      std::copy_n(page + slot * row, row, target + token * row);
      return;
    }
    target[token] = page[slot];
    for (int d = 0; d < value.head_dim; ++d)
      put_value_code(target, value, d, token, get_value_code(page, value, d, slot));
  });
  return out;
}

}  // namespace svdq::testing
