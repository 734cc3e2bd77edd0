// The basis stage: covariance of the keys and, once its eigenvectors are known, the range of every
// channel.

// Tokens whose products are summed in one float buffer; more would lose digits, fewer cost memory.
inline constexpr int64_t kCovarianceRuns = 64;

// A tile of the Gram matrix: narrow, as half of the tiles are not needed.
inline constexpr int kGramRows = SVDQ_TARGET == 512 ? 8 : 4;
inline constexpr int kGramVecs = 2;

// gram [D, D] += rows^T rows, for the tiles on and above the diagonal; sum [D] += rows.
inline void add_gram(const float* rows, int head_dim, float* gram, float* sum) {
  for (int j = 0; j < head_dim; j += kGramVecs * kVecLanes) {
    with_count<kGramVecs>((head_dim - j) / kVecLanes, [&]<int kVecs>() {
      const int last = j + kVecs * kVecLanes;
      for (int i = 0; i < last; i += kGramRows) {
        outer_product_tile<kGramRows, kVecs, true>(rows + i, 1, head_dim, rows + j, head_dim,
                                                   kPageTokens, gram + i * head_dim + j, head_dim);
      }
    });
  }
  for (int d = 0; d < head_dim; d += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((head_dim - d) / kVecLanes, [&]<int kVecs>() {
      F32 total[kVecs];
      for (int v = 0; v < kVecs; ++v) total[v] = load<F32>(sum + d + v * kVecLanes);
      for (int t = 0; t < kPageTokens; ++t) {
        for (int v = 0; v < kVecs; ++v)
          total[v] += load<F32>(rows + t * head_dim + d + v * kVecLanes);
      }
      for (int v = 0; v < kVecs; ++v) store(sum + d + v * kVecLanes, total[v]);
    });
  }
}

// Mean and covariance from the partial sums of one head, taken about `shift`: cov = G / T - delta
// delta^T.
inline void finish_covariance(const float* partial, int64_t num_partial, int head_dim,
                              int64_t num_tokens, const float* shift, float* mean,
                              float* covariance) {
  const int64_t size = int64_t{head_dim} * (head_dim + 1);
  const double inverse = 1.0 / static_cast<double>(num_tokens);
  const auto total = [&](int64_t index) {
    double sum = 0;
    for (int64_t p = 0; p < num_partial; ++p) sum += static_cast<double>(partial[p * size + index]);
    return sum * inverse;
  };
  const int64_t sums = int64_t{head_dim} * head_dim;
  for (int i = 0; i < head_dim; ++i)
    mean[i] = static_cast<float>(total(sums + i));  // delta, for now
  for (int i = 0; i < head_dim; ++i) {
    for (int j = i; j < head_dim; ++j) {
      const double value = total(int64_t{i} * head_dim + j) -
                           static_cast<double>(mean[i]) * static_cast<double>(mean[j]);
      covariance[i * head_dim + j] = covariance[j * head_dim + i] = static_cast<float>(value);
    }
  }
  for (int i = 0; i < head_dim; ++i) mean[i] += shift[i];
}

inline void covariance(const CovarianceParams& p, const Executor& executor) {
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t num_partial = (num_runs + kCovarianceRuns - 1) / kCovarianceRuns;
  const RopeTable table(p.rope, p.position, num_runs);
  const int64_t partial_size = int64_t{p.head_dim} * (p.head_dim + 1);
  const int64_t rows_size = int64_t{kPageTokens} * p.head_dim;
  const AlignedBuffer partials(sizeof(float) * p.num_heads * num_partial * partial_size);
  const AlignedBuffer shifts(sizeof(float) * p.num_heads * p.head_dim);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * rows_size);
  const auto run_length = [&](int64_t run) {
    return static_cast<int>(std::min<int64_t>(kPageTokens, p.keys.num_tokens - run * kPageTokens));
  };

  // A mean far from zero would cancel the covariance's digits: sum about the mean of the first run.
  for_each_task(executor, p.num_heads, [&](int64_t head, int worker) {
    float* rows = scratch.as<float>() + worker * rows_size;
    float* shift = shifts.as<float>() + head * p.head_dim;
    load_rows(p.keys, static_cast<int>(head), p.head_dim, 0, run_length(0), table, 0, 0, nullptr,
              rows);
    for (int d = 0; d < p.head_dim; ++d) {
      float sum = 0;
      for (int t = 0; t < run_length(0); ++t) sum += rows[t * p.head_dim + d];
      shift[d] = sum / static_cast<float>(run_length(0));
    }
  });
  for_each_task(executor, p.num_heads * num_partial, [&](int64_t task, int worker) {
    const int head = static_cast<int>(task / num_partial);
    const int64_t first = task % num_partial * kCovarianceRuns;
    float* rows = scratch.as<float>() + worker * rows_size;
    float* gram = partials.as<float>() + task * partial_size;
    std::memset(gram, 0, sizeof(float) * partial_size);
    for (int64_t run = first; run < std::min(first + kCovarianceRuns, num_runs); ++run) {
      load_rows(p.keys, head, p.head_dim, run * kPageTokens, run_length(run), table, run, 0,
                shifts.as<float>() + int64_t{head} * p.head_dim, rows);
      add_gram(rows, p.head_dim, gram, gram + int64_t{p.head_dim} * p.head_dim);
    }
  });
  for_each_task(executor, p.num_heads, [&](int64_t head, int) {
    finish_covariance(partials.as<float>() + head * num_partial * partial_size, num_partial,
                      p.head_dim, p.keys.num_tokens, shifts.as<float>() + head * p.head_dim,
                      p.mean + head * p.head_dim, p.covariance + head * p.head_dim * p.head_dim);
  });
}

struct Range {
  float centre;
  float scale;  // distance between codes
};

// All lanes of a vector count.
struct AllLanes {};
inline F32 select_lanes(AllLanes, F32 v, F32) { return v; }

// Calls fn(vector, lanes) for n latents, whose memory ends on a whole vector; `lanes` says which
// ones count.
template <typename Fn>
inline void for_each_vector(const float* latent, int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) fn(load<F32>(latent + i), AllLanes{});
  if (i < n) fn(load<F32>(latent + i), (1u << (n - i)) - 1);
}

// Sum of the fourth powers of the errors, times `unit`, of n latents coded in `range` with the highest
// code `top`. Squares would give away the few latents far out, whose tokens attention would then
// misjudge; `unit` keeps the powers of any latents within the range of a float.
inline float coding_error(const float* latent, int64_t n, Range range, float top, float unit) {
  const F32 inverse = splat(range.scale > 0 ? 1.0f / range.scale : 0.0f);
  const F32 mid = splat(top / 2);
  F32 error{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = v - range.centre;
    const F32 code = min(max(round_even(x * inverse + mid), F32{}), splat(top));
    const F32 miss = select_lanes(lanes, x - (code - mid) * range.scale, F32{});
    const F32 square = (miss * unit) * (miss * unit);
    error += square * square;
  });
  return reduce_add(error);
}

// The range of least error: multiples of the standard deviation about the mean on a coarse,
// then a fine geometric grid, and the full range from min to max. Not a number if a latent is not
// finite.
inline Range search_range(const float* latent, int64_t n, int width) {
  const float top = static_cast<float>((1 << width) - 1);
  F32 sum{}, nothing{}, low = splat(latent[0]), high = low;
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    sum += select_lanes(lanes, v, F32{});
    nothing += select_lanes(lanes, v, F32{}) * 0.0f;
    low = min(low, select_lanes(lanes, v, low));
    high = max(high, select_lanes(lanes, v, high));
  });
  const float none = reduce_add(nothing);
  if (none != 0.0f) return {none, none};
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const float least = -reduce_max(-low), most = reduce_max(high);
  F32 squares{};
  for_each_vector(latent, n, [&](F32 v, auto lanes) {
    const F32 x = select_lanes(lanes, v - mean, F32{});
    squares += x * x;
  });
  const float deviation = std::sqrt(reduce_add(squares) / static_cast<float>(n));

  Range best{(least + most) / 2, (most - least) / top};
  const float unit = most > least ? 1.0f / (most - least) : 0.0f;
  float best_error = coding_error(latent, n, best, top, unit);
  const auto attempt = [&](float multiple) {
    const Range range{mean, 2 * multiple * deviation / top};
    const float error = coding_error(latent, n, range, top, unit);
    const bool better = error < best_error;
    if (better) best = range, best_error = error;
    return better;
  };
  float centre_multiple = 0;
  float multiple = 0.4f;
  for (int i = 0; i < 22; ++i, multiple *= 1.15f) {  // 0.4 .. 7.5 standard deviations
    if (attempt(multiple)) centre_multiple = multiple;
  }
  for (int i = -4; i <= 4 && centre_multiple > 0; ++i)
    attempt(centre_multiple * (1 + 0.03f * static_cast<float>(i)));
  return best;
}

// Longest sample of a head that the search looks at, in runs of 64 tokens; also the tasks that the
// runs of a head are spread over.
inline constexpr int64_t kSampleRuns = 64;

// Memory of a head's fit; rank and padding are those of the widest head.
struct QuantizerScratch {
  float* columns;   // [D, padded_rank]
  float* channels;  // [rank, capacity], the sampled latents by channel
  float* extremes;  // [kSampleRuns, 2, padded_rank], least and largest latents by task
  Range* ranges;    // [rank]
  int64_t capacity;
};

// Latents of the runs first, first + step, ... below `end`: their extremes and, if they are to be
// searched, all of them. rows and latent are a worker's.
inline void gather_latents(const QuantizerParams& p, const RopeTable& table, int h, int64_t task,
                           int64_t num_tasks, const QuantizerScratch& s, float* rows,
                           float* latent) {
  const int rank = p.layout.heads[h].rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  // An even sample, of one run a task, or all runs between this task's and the next.
  const int64_t first = task * num_runs / num_tasks;
  const int64_t end = p.clip ? first + 1 : (task + 1) * num_runs / num_tasks;
  float* low = s.extremes + task * 2 * padded;
  float* high = low + padded;
  for (int64_t run = first; run < end; ++run) {
    const int count =
        static_cast<int>(std::min<int64_t>(kPageTokens, p.keys.num_tokens - run * kPageTokens));
    load_rows(p.keys, h, dim, run * kPageTokens, count, table, run, 0, p.mean + int64_t{h} * dim,
              rows);
    project_rows(rows, s.columns, rank, dim, latent);
    for (int j = 0; j < padded; j += kVecLanes) {
      F32 least = run == first ? load<F32>(latent + j) : load<F32>(low + j);
      F32 most = run == first ? least : load<F32>(high + j);
      for (int t = 0; t < count; ++t) {
        const F32 x = load<F32>(latent + t * padded + j);
        least = min(least, x);
        most = max(most, x);
      }
      store(low + j, least);
      store(high + j, most);
    }
    if (!p.clip) continue;
    // Runs before the last are whole, so the sample has no gaps.
    for_each_channel_block(
        latent, rank, [&](int, int, const float* from) { return load<F32>(from); },
        [&](int j, int t, const F32* v) {
          for (int i = 0; i < std::min(kVecLanes, rank - j); ++i)
            store(s.channels + (j + i) * s.capacity + task * kPageTokens + t, v[i]);
        });
  }
}

inline void fit_head_quantizer(const QuantizerParams& p, const RopeTable& table, int h,
                               const QuantizerScratch& s, float* workers, int64_t worker_size,
                               const Executor& executor) {
  const HeadPlan& head = p.layout.heads[h];
  const int rank = head.rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const float* mean = p.mean + int64_t{h} * dim;
  uint16_t* basis = p.basis + int64_t{head.first_channel} * dim;
  for (int64_t i = 0; i < int64_t{rank} * dim; ++i)
    basis[i] = float_to_bfloat16(p.components[int64_t{h} * dim * dim + i]);
  transpose_basis(basis, rank, dim, s.columns);

  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t num_tasks = std::min(num_runs, kSampleRuns);
  for_each_task(executor, rank ? num_tasks : 0, [&](int64_t task, int worker) {
    float* rows = workers + worker * worker_size;
    gather_latents(p, table, h, task, num_tasks, s, rows, rows + kPageTokens * dim);
  });
  // A sample that has the last run has it at its end.
  const int64_t last_run = (num_tasks - 1) * num_runs / num_tasks;
  const int64_t n = (num_tasks - 1) * kPageTokens +
                    std::min<int64_t>(kPageTokens, p.keys.num_tokens - last_run * kPageTokens);
  for_each_task(executor, rank, [&](int64_t j, int) {
    const int width = channel_width(head, static_cast<int>(j));
    if (p.clip) {
      s.ranges[j] = search_range(s.channels + j * s.capacity, n, width);
      return;
    }
    float low = s.extremes[j], high = s.extremes[padded + j];
    for (int64_t task = 1; task < num_tasks; ++task) {
      low = std::min(low, s.extremes[task * 2 * padded + j]);
      high = std::max(high, s.extremes[(task * 2 + 1) * padded + j]);
    }
    s.ranges[j] = {(low + high) / 2, (high - low) / static_cast<float>((1 << width) - 1)};
  });

  float* centred = p.centred_mean + int64_t{h} * dim;
  for (int d = 0; d < dim; ++d) centred[d] = mean[d];
  for (int j = 0; j < rank; ++j) {
    p.scale[head.first_channel + j] = s.ranges[j].scale;
    for (int d = 0; d < dim; ++d) centred[d] += s.ranges[j].centre * s.columns[d * padded + j];
  }
}

// Head after head, its runs and then its channels in parallel: a single head keeps all workers
// busy, and only one head's latents are held.
inline void fit_quantizer(const QuantizerParams& p, const Executor& executor) {
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const RopeTable table(p.rope, p.position, num_runs);
  int rank = 0;
  for (int h = 0; h < p.layout.num_heads; ++h) rank = std::max(rank, p.layout.heads[h].rank());
  const int64_t dim = p.layout.head_dim, padded = padded_rank(rank);
  const int64_t capacity = std::min(num_runs, kSampleRuns) * kPageTokens;
  const int64_t worker_size = round_up(kPageTokens * (dim + padded), kLanes);
  const int64_t columns_size = round_up(dim * padded, kLanes);
  const int64_t channels_size = p.clip ? rank * capacity : 0;
  const AlignedBuffer workers(sizeof(float) * executor.workers() * worker_size);
  const AlignedBuffer shared(sizeof(float) *
                             (columns_size + channels_size + kSampleRuns * 2 * padded));
  const AlignedBuffer ranges(sizeof(Range) * rank);
  float* columns = shared.as<float>();
  const QuantizerScratch scratch{columns, columns + columns_size,
                                 columns + columns_size + channels_size, ranges.as<Range>(),
                                 capacity};
  for (int h = 0; h < p.layout.num_heads; ++h)
    fit_head_quantizer(p, table, h, scratch, workers.as<float>(), worker_size, executor);
}

// Largest bits but for the sign of `count` numbers, a whole number of vectors. Bits without a sign
// are in the order of their magnitudes, and infinity and NaN come last.
template <typename Int>
inline Int largest_bits(const Int* numbers, int64_t count, Int most) {
  typedef Int Vec __attribute__((vector_size(kVecBytes)));
  constexpr int kNumbers = kVecBytes / sizeof(Int);
  const Vec magnitude = Vec{} + std::numeric_limits<Int>::max();
  Vec found = Vec{} + most;
  int64_t i = 0;
  for (; i + kNumbers <= count; i += kNumbers) {
    const Vec bits = load<Vec>(numbers + i) & magnitude;
    found = bits > found ? bits : found;
  }
  for (int n = 0; n < kNumbers; ++n) most = std::max<Int>(most, found[n]);
  for (; i < count; ++i) most = std::max<Int>(most, numbers[i] & std::numeric_limits<Int>::max());
  return most;
}

// The bits of the largest number of a dtype that is no larger than `limit` > 0.
inline int32_t limit_bits(float limit, DataType dtype) {
  const uint32_t bits = float_to_bits(limit);
  if (dtype == DataType::kFloat32) return static_cast<int32_t>(bits);
  if (dtype == DataType::kBFloat16) return static_cast<int32_t>(bits >> 16);
  uint16_t half = float_to_half(std::min(limit, 65504.0f));
  if (half_to_float(half) > limit) --half;
  return half;
}

// True if no number is NaN or larger than `limit`.
inline bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                       const Executor& executor) {
  constexpr int64_t kTokens = 1024;
  const int64_t chunks = (source.num_tokens + kTokens - 1) / kTokens;
  const int32_t allowed = limit_bits(limit, source.dtype);
  std::atomic<bool> within{true};
  const auto check = [&]<typename Int>(int64_t task) {
    const int64_t first = task % chunks * kTokens;
    const int64_t count = std::min(kTokens, source.num_tokens - first);
    const Int* rows = static_cast<const Int*>(source.data) + task / chunks * source.head_stride +
                      first * source.token_stride;
    Int most = 0;
    if (source.token_stride == head_dim) {
      most = largest_bits(rows, count * head_dim, most);
    } else {
      for (int64_t t = 0; t < count; ++t)
        most = largest_bits(rows + t * source.token_stride, head_dim, most);
    }
    if (most > allowed) within.store(false, std::memory_order_relaxed);
  };
  for_each_task(executor, num_heads * chunks, [&](int64_t task, int) {
    if (source.dtype == DataType::kFloat32) {
      check.template operator()<int32_t>(task);
    } else {
      check.template operator()<int16_t>(task);
    }
  });
  return within.load();
}
