// The pages of a split, streamed through shared memory: page table, stages, copies ahead and validity.
//
// A reader (a warp or a block) has `stages` buffers; the copies of a page start `stages` - 1 pages
// before it is read, by cp.async. A page id outside the pool ends the stream: is_valid() is false from
// then on, and the reader makes its results NaN, since a kernel cannot report an error otherwise.
#pragma once

#include "kernels/machine/numbers.cuh"

namespace svdq::device {

// Tokens begin .. end - 1 of a page.
struct TokenRange {
  int begin, end;
  SVDQ_DEVICE bool has(int token) const { return token >= begin && token < end; }
  SVDQ_DEVICE bool whole() const { return begin == 0 && end == kPageTokens; }
};

// Pages first .. last - 1 of a split that hold valid tokens; none if the length does not fit the table.
struct PageRange {
  int first, last;
  int length;  // tokens of the sequence
  bool valid;
};

// The share of split `split` of `splits` of a sequence's pages, those before slot `first_slot` left out; the table has
// room for `max_pages`. Shares follow the length, not the table: a table with room to grow costs splits that are empty.
SVDQ_DEVICE PageRange page_range(const PackedKeys& keys, int sequence, int split, int splits,
                                 int max_pages, int first_slot) {
  const int length = load(&keys.cache_seqlens[sequence]);
  const bool valid = length >= 0 && length <= max_pages * kPageTokens;
  const int skipped = (keys.sink_tokens > first_slot ? keys.sink_tokens : first_slot) / kPageTokens;
  if (keys.sink_tokens >= length || !valid) return {0, 0, length, valid};
  const int stop = page_count(length), count = stop > skipped ? stop - skipped : 0;
  const int share = (count + splits - 1) / splits;
  const int first = skipped + split * share, last = first + share;
  return {first, last < stop ? last : stop, length, valid};
}

// Waits until at most `pending` groups of copies, 0 to 2, are in flight.
SVDQ_DEVICE void wait_copies_except(int pending) {
  SVDQ_DEVICE_CHECK(pending >= 0 && pending <= 2);
  if (pending == 0) {
    wait_copies<0>();
  } else if (pending == 1) {
    wait_copies<1>();
  } else {
    wait_copies<2>();
  }
}

// Buffers of a reader in shared memory.
struct PageStages {
  uint8_t* bytes;
  int count;  // 2 to 4
  int size;   // of one, in bytes

  SVDQ_DEVICE uint8_t* of(int page) const { return bytes + page % count * size; }
};

// `copy(stage, page_id, tokens)` starts the copies of a page, of which `tokens` are valid.
template <typename Copy>
class PageStream {
 public:
  SVDQ_DEVICE PageStream(const PackedKeys& keys, int sequence, const PageRange& range,
                         const PageStages& stages, const Copy& copy)
      : keys_(keys),
        page_table_(keys.page_table + int64_t{sequence} * keys.table_stride),
        range_(range),
        stages_(stages),
        copy_(copy),
        page_(range.first),
        valid_(range.valid) {
    for (int i = 0; i < stages.count - 1; ++i) fetch(page_ + i);
  }

  // For readers that find their input wrong in another way.
  SVDQ_DEVICE void require(bool condition) { valid_ = valid_ && condition; }

  SVDQ_DEVICE bool has_page() const { return page_ < range_.last && valid_; }
  SVDQ_DEVICE int page() const { return page_; }
  SVDQ_DEVICE int64_t page_id() const { return load(&page_table_[page_]); }
  SVDQ_DEVICE uint8_t* bytes() const { return stages_.of(page_); }
  SVDQ_DEVICE TokenRange tokens() const { return tokens_of(page_); }

  // Waits for the copies of this page and starts those of a later one, whose stage the page before had:
  // `sync` lets no thread go on before all threads of the reader are here.
  template <typename Sync>
  SVDQ_DEVICE void receive(const Sync& sync) {
    wait_copies_except(stages_.count - 2);
    sync();
    fetch(page_ + stages_.count - 1);
  }
  SVDQ_DEVICE void advance() { ++page_; }

  // Waits for copies of pages that are not read, and tells if all pages were in the pool.
  SVDQ_DEVICE bool finish() {
    wait_copies<0>();
    return valid_;
  }

 private:
  SVDQ_DEVICE TokenRange tokens_of(int page) const {
    const int begin = page * kPageTokens, sinks = keys_.sink_tokens;
    return {sinks > begin ? sinks - begin : 0,
            range_.length - begin < kPageTokens ? range_.length - begin : kPageTokens};
  }

  SVDQ_DEVICE void fetch(int page) {
    const int64_t id = page < range_.last ? load(&page_table_[page]) : -1;
    const bool known = id >= 0 && id < keys_.num_pages;
    if (known) copy_(stages_.of(page), id, tokens_of(page));
    valid_ = valid_ && (known || page >= range_.last);
    commit_copies();
  }

  const PackedKeys& keys_;  // the kernel's parameter: its fields take no registers
  const int32_t* page_table_;
  PageRange range_;
  PageStages stages_;
  const Copy& copy_;
  int page_;
  bool valid_;
};

}  // namespace svdq::device
