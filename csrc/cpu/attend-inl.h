// The attend stage: flash-decoding over packed pages and exact rows.
//
// Work is cut into tasks of (sequence, KV head, up to kTaskRows query rows, run of blocks). A block
// is a packed page or 64 exact rows. Inside a task every block is visited once: its core channels,
// coded before RoPE, are reconstructed once, then each kMaxRows query rows score it (core, tail or
// both), update their softmax and add its values, while it lies in the nearest cache. The query heads of a KV
// head are rows like the queries of a speculation. Partial results are merged in a fixed order, and
// how work is cut depends on shapes alone, so results do not depend on the number of threads.
//
// Per token, D = 128, 1.25-bit keys after RoPE, 4-bit values, 4 query heads: 92 bytes read; about 4
// vector operations unpack and score, 3 exponentiate, 4 quantize probabilities, 20 multiply values.

// What one worker needs besides a task's row states; see worker_bytes.
struct AttendScratch {
  uint8_t* codes;                // [D, 64] unpacked codes of a page
  float* keys;                   // [D, 64] columns of a page, from its core channels
  float* page_query;             // [kTaskRows, D] turned to the page's first position
  float* scores;                 // [kMaxRows, 64]
  Probabilities* probabilities;  // [kMaxRows]
  WeightCodes* weights;          // [kMaxRows, v_groups]
  ValueScales* value_scales;     // [v_groups]
  double* rotation;              // [2 * half], to the page's first position
  float* turns;                  // [half, 2, 64], of gathered tokens to their positions
  RowBlock rows;                 // kTaskRows rows
};

// Lays the scratch of one worker out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_scratch(const AttendPlan& plan, uint8_t* base, AttendScratch& s) {
  const int64_t dim = plan.p.layout.head_dim, groups = plan.p.layout.value.groups();
  int64_t bytes = 0;
  carve(s.codes, base, bytes, dim * kPageTokens);
  carve(s.keys, base, bytes, dim * kPageTokens);
  carve(s.page_query, base, bytes, kTaskRows * dim);
  carve(s.scores, base, bytes, kMaxRows * kPageTokens);
  carve(s.probabilities, base, bytes, kMaxRows);
  carve(s.weights, base, bytes, kMaxRows * groups);
  carve(s.value_scales, base, bytes, groups);
  carve(s.rotation, base, bytes, 2 * plan.p.rope.half);
  if (plan.gathered()) carve(s.turns, base, bytes, 2 * plan.p.rope.half * kPageTokens);
  carve(s.rows.state, base, bytes, kTaskRows);
  carve(s.rows.zero_sum, base, bytes, kTaskRows * groups * kVecLanes);
  carve(s.rows.out, base, bytes, kTaskRows * dim);
  return bytes;
}

// One task: where it reads and which rows it serves.
struct AttendTask {
  int64_t b, h, sequence_head;
  int64_t row;   // first query row
  int64_t rows;  // count
  int64_t split;
};

// Slots of the 64 tokens of a gathered page.
inline const int32_t* gathered_slots(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  return plan.p.token_slots + (task.sequence_head * plan.p.table_stride + page) * kPageTokens;
}

// Tokens of packed page `page` that count: neither sinks nor past the end nor gathered from nowhere.
inline uint64_t page_mask(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const int64_t begin =
      std::clamp<int64_t>(plan.p.sink_tokens - page * kPageTokens, 0, kPageTokens);
  const int64_t end =
      std::clamp<int64_t>(plan.p.cache_seqlens[task.b] - page * kPageTokens, 0, kPageTokens);
  if (begin >= end) return 0;
  uint64_t mask = end == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  mask &= ~uint64_t{0} << begin;
  if (!plan.gathered()) return mask;
  const int32_t* slots = gathered_slots(plan, task, page);
  uint64_t there = 0;
  for (int t = 0; t < kPageTokens; ++t) there |= uint64_t{slots[t] != INT32_MAX} << t;
  return mask & there;
}

inline RowBlock sub_block(const RowBlock& rows, int64_t first, int head_dim, int v_groups) {
  return {rows.state + first, rows.zero_sum + first * v_groups * kVecLanes,
          rows.out + first * head_dim};
}

// Softmax of kRows rows of scores. Rows that see nothing get zero probabilities. Returns false if
// no row sees anything.
template <int kRows>
inline bool softmax_rows(const AttendScratch& s, const RowBlock& rows,
                         const uint64_t (&masks)[kRows], int dim, int groups) {
  bool any = false;
  for (int r = 0; r < kRows; ++r) {
    if (softmax_row(rows, r, s.scores + r * kPageTokens, masks[r], dim, groups,
                    s.probabilities[r])) {
      any = true;
    } else {
      std::memset(s.probabilities + r, 0, sizeof(Probabilities));
    }
  }
  return any;
}

// One head's keys and values in a page of the sequence.
struct PageBytes {
  const uint8_t* keys;
  const uint8_t* values;
};

// Outliers first .. first + count - 1 of a head's list.
struct OutlierRange {
  int64_t first, count;
};

// Those of page `page`, of which none lies before place `from` of the list.
inline OutlierRange page_outliers(const AttendPlan& plan, const AttendTask& task, int64_t page,
                                  int64_t from) {
  const int64_t all = plan.p.outliers;
  const int32_t* slots = plan.p.outlier_slots + task.sequence_head * all;
  int64_t first = from;
  while (first < all && slots[first] < page * kPageTokens) ++first;
  int64_t last = first;
  while (last < all && slots[last] < (page + 1) * kPageTokens) ++last;
  return {first, last - first};
}

inline PageBytes page_bytes(const AttendPlan& plan, const AttendTask& task, int64_t page) {
  const LayoutView& layout = plan.p.layout;
  const int64_t id = plan.p.page_table[task.b * plan.p.table_stride + page];
  return {plan.p.k_pages + id * layout.k_page_bytes + plan.head(task.h).k_offset,
          plan.p.v_pages + id * layout.v_page_bytes + task.h * layout.value.page_bytes()};
}

template <int kRows>
inline void attend_page_rows(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             int64_t first, const PageBytes& page, const OutlierRange& outliers,
                             Prefetcher& next, uint64_t mask) {
  const AttendParams& p = plan.p;
  const int dim = p.layout.head_dim, groups = p.layout.value.groups();
  const HeadPlan& head = plan.head(task.h);
  const RowBlock rows = sub_block(s.rows, first, dim, groups);
  if (plan.has_core())
    column_scores<kRows>(s.page_query + first * dim, dim, p.rope.half, s.keys, s.scores);
  if (plan.has_tail()) {
    const QueryCodes query = tail_codes(plan, task.sequence_head, head);
    const uint8_t* lines = page.keys + head.core.page_bytes();
    const int row = static_cast<int>(task.row + first);
    if (plan.has_core()) {
      code_scores<false, kRows, true>(lines, head.tail, query, row, s.scores);
    } else {
      code_scores<false, kRows>(lines, head.tail, query, row, s.scores);
    }
  }
  for (int64_t i = outliers.first; i < outliers.first + outliers.count; ++i) {
    const int64_t at = task.sequence_head * p.outliers + i;
    const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
    exact_score<kRows>(query, dim, p.outlier_keys, p.outlier_dtype, at * dim,
                       s.scores + p.outlier_slots[at] % kPageTokens);
  }
  uint64_t masks[kRows];
  for (int r = 0; r < kRows; ++r) masks[r] = mask;
  if (!softmax_rows<kRows>(s, rows, masks, dim, groups)) return;

  if (!p.layout.value.packed()) {
    accumulate_exact<kRows>(s.probabilities, page.values, p.v_dtype, 0, mask, dim, rows.out);
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int g = 0; g < groups; ++g) {
      quantize_probabilities(s.probabilities[r], s.value_scales[g],
                             rows.zero_sum + (r * groups + g) * kVecLanes,
                             s.weights[r * groups + g]);
    }
  }
  if (p.layout.value.bits == 4)
    accumulate_packed<4, kRows>(p.layout.value, page.values, s.weights, next, rows.out);
  if (p.layout.value.bits == 2)
    accumulate_packed<2, kRows>(p.layout.value, page.values, s.weights, next, rows.out);
}

// Reconstructs keys from core channels, rotated relative to the first position of their page;
// gathered ones to the positions that `turns` tells.
inline void reconstruct_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                             const uint8_t* lines) {
  const HeadPlan& head = plan.head(task.h);
  reconstruct_keys(lines, head.core, core_codes(plan, task.sequence_head, head),
                   plan.p.layout.head_dim, plan.p.rope.half,
                   plan.gathered() ? s.turns : plan.angles.column_cos(0), s.codes, s.keys);
}

// Rotations of the 64 tokens of a gathered page, by pair: that of the page each came from times
// that of its offset there.
inline void turn_gathered(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                          int64_t page) {
  const int half = plan.p.rope.half;
  const int32_t* slots = gathered_slots(plan, task, page);
  for (int first = 0; first < kPageTokens; first += kVecLanes) {
    const float* base[kVecLanes];
    const float* offset[kVecLanes];
    for (int t = 0; t < kVecLanes; ++t) {
      const int64_t slot = slots[first + t] == INT32_MAX ? 0 : slots[first + t];
      base[t] = plan.base_rotation(task.b, slot / kPageTokens);
      offset[t] = plan.angles.row_cos(static_cast<int>(slot % kPageTokens));
    }
    int i = 0;
    for (; i + kVecLanes <= half; i += kVecLanes) {
      F32 cosines[kVecLanes], sines[kVecLanes];
      for (int t = 0; t < kVecLanes; ++t) {
        const F32 a = load<F32>(base[t] + i), b = load<F32>(base[t] + half + i);
        const F32 c = load<F32>(offset[t] + i), d = load<F32>(offset[t] + half + i);
        cosines[t] = a * c - b * d;
        sines[t] = b * c + a * d;
      }
      transpose(cosines);
      transpose(sines);
      for (int j = 0; j < kVecLanes; ++j) {
        float* to = s.turns + int64_t{i + j} * 2 * kPageTokens + first;
        store(to, cosines[j]);
        store(to + kPageTokens, sines[j]);
      }
    }
    for (; i < half; ++i) {
      float* to = s.turns + int64_t{i} * 2 * kPageTokens + first;
      for (int t = 0; t < kVecLanes; ++t) {
        const float a = base[t][i], b = base[t][half + i], c = offset[t][i],
                    d = offset[t][half + i];
        to[t] = a * c - b * d;
        to[kPageTokens + t] = b * c + a * d;
      }
    }
  }
}

// Turns the queries back by the first position of the page, or not where keys are turned all the way.
inline void turn_queries(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s) {
  const int dim = plan.p.layout.head_dim, half = plan.p.rope.half;
  float cosines[kMaxHeadDim / 2], sines[kMaxHeadDim / 2];
  for (int i = 0; i < half; ++i) {
    cosines[i] = static_cast<float>(s.rotation[i]);
    sines[i] = static_cast<float>(s.rotation[half + i]);
  }
  const float* query = plan.query + (task.sequence_head * plan.rows + task.row) * dim;
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memcpy(s.page_query + r * dim, query + r * dim, sizeof(float) * dim);
    if (!plan.gathered()) rotate_back(s.page_query + r * dim, cosines, sines, half);
  }
}

inline void attend_page(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                        int64_t page, const OutlierRange& outliers) {
  const AttendParams& p = plan.p;
  const uint64_t mask = page_mask(plan, task, page);
  const PageBytes bytes = page_bytes(plan, task, page);
  // The next page of this task, or of whichever task follows on the same pages.
  const PageBytes after = page_bytes(plan, task, std::min(page + 1, plan.pages(task.b) - 1));
  Prefetcher next{after.keys, after.keys + plan.head(task.h).page_bytes()};
  next.fetch(kMaxHeadDim);
  next = {after.values, after.values + p.layout.value.page_bytes()};
  if (plan.has_core()) {
    if (plan.gathered()) turn_gathered(plan, task, s, page);
    if (plan.head(task.h).core.rank() > 0 || plan.gathered())
      reconstruct_page(plan, task, s, bytes.keys);
    turn_queries(plan, task, s);
  }
  for (int g = 0; g < p.layout.value.groups(); ++g)
    load_value_scales(p.layout.value, bytes.values, g, mask, s.value_scales[g]);
  for (int64_t first = 0; first < task.rows; first += kMaxRows) {
    with_count<kMaxRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      attend_page_rows<kRows>(plan, task, s, first, bytes, outliers, next, mask);
    });
  }
}

// Exact rows block * 64 and on.
inline void attend_exact(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s,
                         int64_t block) {
  const AttendParams& p = plan.p;
  const int dim = p.layout.head_dim, groups = p.layout.value.groups();
  const int64_t begin = block * kPageTokens;
  const int count =
      static_cast<int>(std::min<int64_t>(kPageTokens, plan.exact_len(task.b) - begin));
  const int64_t at = task.b * p.exact_batch_stride + task.h * p.exact_head_stride + begin * dim;
  for (int64_t first = 0; first < task.rows; first += kMaxRows) {
    with_count<kMaxRows>(static_cast<int>(task.rows - first), [&]<int kRows>() {
      uint64_t masks[kRows], any = 0;
      for (int r = 0; r < kRows; ++r) {
        int64_t visible = count;
        if (p.causal) {
          const int64_t i = (task.row + first + r) % p.q_len;
          visible =
              std::clamp<int64_t>(plan.exact_len(task.b) - (p.q_len - 1 - i) - begin, 0, count);
        }
        masks[r] = visible == kPageTokens ? ~uint64_t{0} : (uint64_t{1} << visible) - 1;
        any |= masks[r];
      }
      if (any == 0) return;
      const RowBlock rows = sub_block(s.rows, first, dim, groups);
      const float* query = plan.query + (task.sequence_head * plan.rows + task.row + first) * dim;
      exact_scores<kRows>(query, dim, p.exact_keys, p.exact_dtype, at, count, s.scores);
      if (!softmax_rows<kRows>(s, rows, masks, dim, groups)) return;
      accumulate_exact<kRows>(s.probabilities, p.exact_values, p.exact_dtype, at, any, dim,
                              rows.out);
    });
  }
}

inline void attend_task(const AttendPlan& plan, const AttendTask& task, const AttendScratch& s) {
  const AttendParams& p = plan.p;
  const int dim = p.layout.head_dim, groups = p.layout.value.groups();
  reset_rows(s.rows, static_cast<int>(task.rows), dim, groups);
  const int64_t pages = plan.pages(task.b), first = task.split * plan.split_blocks;
  const int64_t last = std::min(first + plan.split_blocks, plan.blocks(task.b));
  const int half = p.rope.half;
  // Without core channels the columns are those of the mean, in every page the same.
  if (plan.has_core() && plan.head(task.h).core.rank() == 0 && !plan.gathered())
    reconstruct_page(plan, task, s, nullptr);
  if (!plan.gathered())
    std::memcpy(s.rotation, plan.split_rotation + (task.b * plan.splits + task.split) * 2 * half,
                sizeof(double) * 2 * half);
  OutlierRange outliers{};
  for (int64_t block = first; block < last; ++block) {
    if (block >= pages) {
      attend_exact(plan, task, s, block - pages);
      continue;
    }
    if (p.outliers) outliers = page_outliers(plan, task, block, outliers.first + outliers.count);
    if (page_mask(plan, task, block) != 0) attend_page(plan, task, s, block, outliers);
    if (!plan.gathered()) advance_rotation(s.rotation, plan.angles.page_turn(), half);
  }
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t at = (task.sequence_head * plan.rows + task.row + r) * plan.splits + task.split;
    float* out = plan.partial_out + at * dim;
    for (int d = 0; d < dim; d += kVecLanes) {
      F32 value = load<F32>(s.rows.out + r * dim + d);
      // Zero points are one number per group: all its channels get the same sum.
      if (groups)
        value += reduce_add(
            load<F32>(s.rows.zero_sum + (r * groups + d / p.layout.value.group_size) * kVecLanes));
      store(out + d, value);
    }
    plan.partial_max[at] = s.rows.state[r].max;
    plan.partial_sum[at] = reduce_add(load<F32>(s.rows.state[r].sum));
  }
}

inline void attend(const AttendParams& p, const Executor& executor) {
  const PageAngles angles(p.rope);
  AttendPlan plan = make_plan(p, angles);
  AttendScratch scratch;
  const int64_t plan_bytes = carve_plan(plan, nullptr);
  const int64_t worker_bytes = carve_scratch(plan, nullptr, scratch);
  const AlignedBuffer memory(plan_bytes + worker_bytes * executor.workers());
  carve_plan(plan, memory.as());
  if (plan.gathered()) {
    prepare_bases(plan);
  } else {
    prepare_rotations(plan);
  }

  // Waking threads costs more than preparing or merging one decode step: that is left to this one.
  const SerialExecutor this_thread;
  const auto executor_for = [&](int64_t products) -> const Executor& {
    return products < kSerialProducts ? this_thread : executor;
  };
  const int64_t heads = plan.sequence_heads(), dim = p.layout.head_dim;
  for_each_task(executor_for(plan.batch_rank() * plan.weight_rows * dim), heads,
                [&](int64_t sequence_head, int) { prepare_head(plan, sequence_head); });
  for_each_task(executor, heads * plan.row_chunks * plan.splits, [&](int64_t index, int worker) {
    AttendScratch own;
    carve_scratch(plan, memory.as(plan_bytes + worker_bytes * worker), own);
    const int64_t split = index % plan.splits, rest = index / plan.splits;
    const int64_t head = rest / plan.row_chunks, row = rest % plan.row_chunks * kTaskRows;
    const int64_t count = std::min(kTaskRows, plan.rows - row);
    attend_task(
        plan, {head / p.layout.num_heads, head % p.layout.num_heads, head, row, count, split}, own);
  });
  constexpr int64_t kRowsPerTask = 16;
  const int64_t rows = heads * plan.rows;
  for_each_task(executor_for(rows * plan.splits * dim), (rows + kRowsPerTask - 1) / kRowsPerTask,
                [&](int64_t task, int) {
                  const int64_t last = std::min((task + 1) * kRowsPerTask, rows);
                  for (int64_t row = task * kRowsPerTask; row < last; ++row) finish_row(plan, row);
                });
}
