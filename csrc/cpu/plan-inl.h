// How a call to attend is cut into tasks, and what is prepared once for all of them: scaled
// queries, quantized weights of every head, rotations to where splits begin.

// Query rows of one task; a multiple of kMaxRows. More would push their outputs out of the nearest
// cache.
inline constexpr int64_t kTaskRows = 64;
// Blocks of a split: few enough to fill all cores with one KV head, enough to hide what a task sets
// up.
inline constexpr int64_t kMinSplitBlocks = 16;
// Splits stop when there are this many tasks.
inline constexpr int64_t kTargetTasks = 256;

// Multiply-adds below which a step of the plan is not worth other threads: some 50 microseconds.
inline constexpr int64_t kSerialProducts = 1 << 19;

// Scores are kept in units of log2, so that the softmax needs 2^x alone.
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// Sizes that all tasks share, and the memory they use.
struct AttendPlan {
  const AttendParams& p;
  const PageAngles& angles;
  int64_t rows;               // query rows of a KV head: its query heads times q_len
  int64_t core_rows;          // rows of QueryCodes over core channels: D, or none after RoPE
  int64_t weight_rows;        // those, then rows over tail channels: rows, or none before RoPE
  int64_t row_chunks = 1;     // tasks over rows
  int64_t splits = 1;         // tasks over blocks
  int64_t split_blocks = 1;   // blocks of one split
  float* query = nullptr;     // [B, H, rows, D], times sm_scale * log2(e)
  int8_t* weights = nullptr;  // [B, H, weight_rows, 2, D]: high and low terms
  float* steps = nullptr;     // [B, H, weight_rows, kNumWidths]
  float* offsets = nullptr;   // [B, H, weight_rows]
  double* split_rotation = nullptr;  // [B, splits, 2 * half]: rotation to a split's first position
  int64_t source_pages = 0;          // pages that gathered tokens come from, at most
  float* bases = nullptr;            // [B, source_pages, 2 * half]: rotations to those
  float* partial_out = nullptr;      // [B, H, rows, splits, D]
  float* partial_max = nullptr;      // [B, H, rows, splits], log2 units
  float* partial_sum = nullptr;      // [B, H, rows, splits]

  bool gathered() const { return p.token_slots != nullptr; }
  const float* base_rotation(int64_t b, int64_t page) const {
    return bases + (b * source_pages + page) * 2 * p.rope.half;
  }
  bool has_core() const { return p.layout.rope != RopeMode::kPost; }
  bool has_tail() const { return p.layout.rope != RopeMode::kPre; }
  const HeadPlan& head(int64_t h) const { return p.layout.heads[h]; }
  int64_t batch_rank() const { return int64_t{p.batch} * p.layout.rank; }
  int64_t sequence_heads() const { return int64_t{p.batch} * p.layout.num_heads; }
  int64_t exact_len(int64_t b) const { return p.exact_lens[b]; }
  int64_t pages(int64_t b) const {
    return (int64_t{p.cache_seqlens[b]} + kPageTokens - 1) / kPageTokens;
  }
  int64_t blocks(int64_t b) const {
    return pages(b) + (exact_len(b) + kPageTokens - 1) / kPageTokens;
  }
};

// Takes `count` numbers from the memory at `base`, which starts `bytes` in; null stays null, to
// measure.
template <typename T>
inline void carve(T*& to, uint8_t* base, int64_t& bytes, int64_t count) {
  to = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
  bytes += round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes);
}

// Lays the plan's memory out from `base` (null: only to measure); returns its bytes.
inline int64_t carve_plan(AttendPlan& plan, uint8_t* base) {
  const int64_t dim = plan.p.layout.head_dim, rows = plan.sequence_heads() * plan.rows;
  const int64_t weight_rows = plan.sequence_heads() * plan.weight_rows;
  int64_t bytes = 0;
  carve(plan.query, base, bytes, rows * dim);
  carve(plan.weights, base, bytes, weight_rows * 2 * dim);
  carve(plan.steps, base, bytes, weight_rows * kNumWidths);
  carve(plan.offsets, base, bytes, weight_rows);
  carve(plan.split_rotation, base, bytes, plan.p.batch * plan.splits * 2 * plan.p.rope.half);
  carve(plan.bases, base, bytes, plan.p.batch * plan.source_pages * 2 * plan.p.rope.half);
  carve(plan.partial_out, base, bytes, rows * plan.splits * dim);
  carve(plan.partial_max, base, bytes, rows * plan.splits);
  carve(plan.partial_sum, base, bytes, rows * plan.splits);
  return bytes;
}

inline AttendPlan make_plan(const AttendParams& p, const PageAngles& angles) {
  const int64_t rows = p.num_qo_heads / p.layout.num_heads * p.q_len;
  const int64_t core_rows = p.layout.rope == RopeMode::kPost ? 0 : p.layout.head_dim;
  const int64_t tail_rows = p.layout.rope == RopeMode::kPre ? 0 : rows;
  AttendPlan plan{.p = p,
                  .angles = angles,
                  .rows = rows,
                  .core_rows = core_rows,
                  .weight_rows = core_rows + tail_rows};
  plan.row_chunks = (rows + kTaskRows - 1) / kTaskRows;
  if (plan.gathered() && plan.has_core()) {
    const int64_t all = plan.sequence_heads() * p.table_stride * kPageTokens;
    for (int64_t i = 0; i < all; ++i) {
      const int64_t slot = p.token_slots[i];
      if (slot != INT32_MAX)
        plan.source_pages = std::max(plan.source_pages, slot / kPageTokens + 1);
    }
  }
  int64_t most_blocks = 1;
  for (int b = 0; b < p.batch; ++b) most_blocks = std::max(most_blocks, plan.blocks(b));
  const int64_t tasks = plan.sequence_heads() * plan.row_chunks;
  const int64_t wanted = std::max<int64_t>(1, kTargetTasks / std::max<int64_t>(1, tasks));
  plan.split_blocks = std::max(kMinSplitBlocks, (most_blocks + wanted - 1) / wanted);
  plan.splits = (most_blocks + plan.split_blocks - 1) / plan.split_blocks;
  return plan;
}

// Rows of weights from `row` on, over `rank` channels.
inline QueryCodes weight_codes(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                               int rank) {
  const int64_t first = sequence_head * plan.weight_rows + row;
  const int8_t* high = plan.weights + first * 2 * plan.p.layout.head_dim;
  return {high, high + rank, plan.steps + first * kNumWidths, plan.offsets + first,
          2 * int64_t{plan.p.layout.head_dim}};
}

// What multiplies a head's core codes: a row for each column of its keys.
inline QueryCodes core_codes(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head) {
  return weight_codes(plan, sequence_head, 0, head.core.rank());
}

// What multiplies a head's tail codes: a row for each query.
inline QueryCodes tail_codes(const AttendPlan& plan, int64_t sequence_head, const HeadPlan& head) {
  return weight_codes(plan, sequence_head, plan.core_rows, head.tail.rank());
}

// Quantizes one row of weights [rank] over the channels of `bands`, band by band; `offset` takes
// off what the mid codes contribute.
inline void quantize_row(const Bands& bands, const float* weights, float constant, int8_t* codes,
                         float* steps, float* offset) {
  const int rank = bands.rank();
  int channel = 0;
  for (int w = 0; w < kNumWidths; ++w) {
    const int count = bands.count[w];
    int8_t* high = codes + channel;
    int8_t* low = kWidths[w] == 8 ? codes + rank + channel : nullptr;
    steps[w] = quantize_weights(weights + channel, count, high, low);
    // With the quantized weights, so that their rounding meets code - mid and not the much larger
    // code.
    int64_t sum = 0, sum_low = 0;
    for (int j = 0; j < count; ++j) {
      sum += high[j];
      if (low) sum_low += low[j];
    }
    const float mid = static_cast<float>((1 << kWidths[w]) - 1) / 2;
    constant -=
        mid * steps[w] * (static_cast<float>(sum) + static_cast<float>(sum_low) / kLowSteps);
    channel += count;
  }
  *offset = constant;
}

inline float dot_rows(const float* a, const float* b, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load<F32>(a + i) * load<F32>(b + i);
  return reduce_add(sum);
}

inline float dot_basis(const uint16_t* basis, const float* x, int n) {
  F32 sum{};
  for (int i = 0; i < n; i += kVecLanes) sum += load_bfloat16(basis + i) * load<F32>(x + i);
  return reduce_add(sum);
}

// Quantizes row `row` of a head's weights [bands.rank()], where `constant` multiplies no code.
inline void store_weights(const AttendPlan& plan, int64_t sequence_head, int64_t row,
                          const Bands& bands, const float* weights, float constant) {
  const int64_t at = sequence_head * plan.weight_rows + row;
  quantize_row(bands, weights, constant, plan.weights + at * 2 * plan.p.layout.head_dim,
               plan.steps + at * kNumWidths, plan.offsets + at);
}

// Scales the queries of one (sequence, KV head) and prepares what multiplies its codes.
inline void prepare_head(const AttendPlan& plan, int64_t sequence_head) {
  const AttendParams& p = plan.p;
  const int64_t b = sequence_head / p.layout.num_heads, h = sequence_head % p.layout.num_heads;
  const int dim = p.layout.head_dim;
  const HeadPlan& head = plan.head(h);
  float* query = plan.query + sequence_head * plan.rows * dim;
  const float factor = p.sm_scale * kLog2E;
  for (int64_t i = 0; i < plan.rows * dim; i += kVecLanes) {
    store(query + i,
          load_as_float(p.query, p.query_dtype, sequence_head * plan.rows * dim + i) * factor);
  }
  if (plan.pages(b) == 0) return;

  const uint16_t* basis = p.basis + (b * p.layout.rank + head.first_channel) * dim;
  const float* scale = p.scale + b * p.layout.rank + head.first_channel;
  const float* mean = p.mean + sequence_head * dim;
  float weights[kMaxHeadDim];
  for (int64_t row = 0; row < plan.core_rows; ++row) {
    const int channel = pair_channel(static_cast<int>(row), p.rope.half);
    for (int j = 0; j < head.core.rank(); ++j)
      weights[j] = bfloat16_to_float(basis[int64_t{j} * dim + channel]) * scale[j];
    store_weights(plan, sequence_head, row, head.core, weights, mean[channel]);
  }
  basis += int64_t{head.core.rank()} * dim;
  scale += head.core.rank();
  if (p.layout.rope == RopeMode::kHybrid) mean = p.tail_mean + sequence_head * dim;
  for (int64_t row = plan.core_rows; row < plan.weight_rows; ++row) {
    const float* q = query + (row - plan.core_rows) * dim;
    for (int j = 0; j < head.tail.rank(); ++j)
      weights[j] = dot_basis(basis + int64_t{j} * dim, q, dim) * scale[j];
    store_weights(plan, sequence_head, row, head.tail, weights, dot_rows(q, mean, dim));
  }
}

// Rotations to the first position of every split.
inline void prepare_rotations(const AttendPlan& plan) {
  const int half = plan.p.rope.half;
  for (int64_t b = 0; b < plan.p.batch; ++b) {
    double* rotation = plan.split_rotation + b * plan.splits * 2 * half;
    start_rotation(plan.p.rope, plan.p.first_position ? plan.p.first_position[b] : 0, rotation);
    for (int64_t split = 1; split < plan.splits; ++split) {
      double* next = rotation + 2 * half;
      std::memcpy(next, rotation, sizeof(double) * 2 * half);
      for (int64_t i = 0; i < plan.split_blocks; ++i)
        advance_rotation(next, plan.angles.page_turn(), half);
      rotation = next;
    }
  }
}

// Rotations to the first positions of all pages that gathered tokens may come from.
inline void prepare_bases(const AttendPlan& plan) {
  const int half = plan.p.rope.half;
  for (int64_t b = 0; b < plan.p.batch && plan.source_pages; ++b) {
    const int64_t first = plan.p.first_position ? plan.p.first_position[b] : 0;
    const RopeTable table(plan.p.rope, first, plan.source_pages);
    std::memcpy(plan.bases + b * plan.source_pages * 2 * half, table.base_cos(0),
                sizeof(float) * plan.source_pages * 2 * half);
  }
}
