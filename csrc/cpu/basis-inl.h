// The basis stage: covariance of the keys and, once its eigenvectors are known, the range of every
// channel.

// Tokens whose products are summed in one float buffer; more would lose digits, fewer cost memory.
inline constexpr int64_t kCovarianceRuns = 64;

// gram [D, D] += rows^T rows, for the tiles on and above the diagonal; sum [D] += rows.
inline void add_gram(const float* rows, int head_dim, float* gram, float* sum) {
  for (int j = 0; j < head_dim; j += kTileVecs * kVecLanes) {
    with_count<kTileVecs>((head_dim - j) / kVecLanes, [&]<int kVecs>() {
      const int last = j + kVecs * kVecLanes;
      for (int i = 0; i < last; i += kTileTokens) {
        outer_product_tile<kVecs, true>(rows + i, 1, head_dim, rows + j, head_dim, kPageTokens,
                                        gram + i * head_dim + j, head_dim);
      }
    });
  }
  for (int d = 0; d < head_dim; d += kVecLanes) {
    F32 total = load<F32>(sum + d);
    for (int t = 0; t < kPageTokens; ++t) total += load<F32>(rows + t * head_dim + d);
    store(sum + d, total);
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

// Calls fn(vector, lanes) for n latents, whose memory ends on a whole vector; `lanes` has a bit for
// each one that counts.
template <typename Fn>
inline void for_each_vector(const float* latent, int64_t n, const Fn& fn) {
  constexpr uint32_t kAllLanes = (1u << kVecLanes) - 1;
  int64_t i = 0;
  for (; i + kVecLanes <= n; i += kVecLanes) fn(load<F32>(latent + i), kAllLanes);
  if (i < n) fn(load<F32>(latent + i), (1u << (n - i)) - 1);
}

// Sum of the fourth powers of the errors, times `unit`, of n latents coded in `range` with the highest
// code `top`. Squares would give away the few latents far out, whose tokens attention would then
// misjudge; `unit` keeps the powers of any latents within the range of a float.
inline float coding_error(const float* latent, int64_t n, Range range, float top, float unit) {
  const F32 inverse = splat(range.scale > 0 ? 1.0f / range.scale : 0.0f);
  const F32 mid = splat(top / 2);
  F32 error{};
  for_each_vector(latent, n, [&](F32 v, uint32_t lanes) {
    const F32 x = v - range.centre;
    const F32 code = min(max(round_even(x * inverse + mid), F32{}), splat(top));
    const F32 miss = select_lanes(lanes, x - (code - mid) * range.scale, F32{});
    const F32 square = (miss * unit) * (miss * unit);
    error += square * square;
  });
  return reduce_add(error);
}

// The range of least error: multiples of the standard deviation about the mean on a coarse,
// then a fine geometric grid, and the full range from min to max.
inline Range search_range(const float* latent, int64_t n, int width) {
  const float top = static_cast<float>((1 << width) - 1);
  F32 sum{}, low = splat(latent[0]), high = low;
  for_each_vector(latent, n, [&](F32 v, uint32_t lanes) {
    sum += select_lanes(lanes, v, F32{});
    low = min(low, select_lanes(lanes, v, low));
    high = max(high, select_lanes(lanes, v, high));
  });
  const float mean = reduce_add(sum) / static_cast<float>(n);
  const float least = -reduce_max(-low), most = reduce_max(high);
  F32 squares{};
  for_each_vector(latent, n, [&](F32 v, uint32_t lanes) {
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

// Longest sample of a head that the search looks at, in runs of 64 tokens.
inline constexpr int64_t kSampleRuns = 64;

inline void fit_head_quantizer(const QuantizerParams& p, const RopeTable& table, int h, float* rows,
                               float* latent, float* columns, float* channels) {
  const HeadPlan& head = p.layout.heads[h];
  const int rank = head.rank(), dim = p.layout.head_dim, padded = padded_rank(rank);
  const float* mean = p.mean + int64_t{h} * dim;
  uint16_t* basis = p.basis + int64_t{head.first_channel} * dim;
  for (int64_t i = 0; i < int64_t{rank} * dim; ++i)
    basis[i] = float_to_bfloat16(p.components[int64_t{h} * dim * dim + i]);
  transpose_basis(basis, rank, dim, columns);

  // Gather latents by channel: all runs, or an even sample of them when only a sample is needed.
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t num_samples = std::min(num_runs, kSampleRuns);
  const int64_t capacity = num_samples * kPageTokens;
  float* low = channels + rank * capacity;
  float* high = low + rank;
  int64_t n = 0;
  for (int64_t sample = 0; sample < (p.clip ? num_samples : num_runs); ++sample) {
    const int64_t run = p.clip ? sample * num_runs / num_samples : sample;
    const int count =
        static_cast<int>(std::min<int64_t>(kPageTokens, p.keys.num_tokens - run * kPageTokens));
    load_rows(p.keys, h, dim, run * kPageTokens, count, table, run, 0, mean, rows);
    project_rows(rows, columns, rank, dim, latent);
    for (int j = 0; j < rank; ++j) {
      for (int t = 0; t < count; ++t) {
        const float x = latent[t * padded + j];
        if (p.clip) channels[j * capacity + n + t] = x;
        low[j] = n + t == 0 ? x : std::min(low[j], x);
        high[j] = n + t == 0 ? x : std::max(high[j], x);
      }
    }
    n += count;
  }

  float* centred = p.centred_mean + int64_t{h} * dim;
  for (int d = 0; d < dim; ++d) centred[d] = mean[d];
  for (int j = 0; j < rank; ++j) {
    const int width = channel_width(head, j);
    Range range{(low[j] + high[j]) / 2, (high[j] - low[j]) / static_cast<float>((1 << width) - 1)};
    if (p.clip) {
      range = search_range(channels + j * capacity, n, width);
    }
    p.scale[head.first_channel + j] = range.scale;
    for (int d = 0; d < dim; ++d) centred[d] += range.centre * columns[d * padded + j];
  }
}

inline void fit_quantizer(const QuantizerParams& p, const Executor& executor) {
  const int64_t num_runs = (p.keys.num_tokens + kPageTokens - 1) / kPageTokens;
  const RopeTable table(p.rope, p.position, num_runs);
  const int64_t dim = p.layout.head_dim, padded = padded_rank(static_cast<int>(dim));
  const int64_t capacity = std::min(num_runs, kSampleRuns) * kPageTokens;
  const int64_t rows_size = kPageTokens * dim, latent_size = kPageTokens * padded,
                columns_size = dim * padded;
  const int64_t worker_size =
      round_up(rows_size + latent_size + columns_size + dim * (capacity + 2), kLanes);
  const AlignedBuffer scratch(sizeof(float) * executor.workers() * worker_size);
  for_each_task(executor, p.layout.num_heads, [&](int64_t head, int worker) {
    float* rows = scratch.as<float>() + worker * worker_size;
    float* latent = rows + rows_size;
    float* columns = latent + latent_size;
    fit_head_quantizer(p, table, static_cast<int>(head), rows, latent, columns,
                       columns + columns_size);
  });
}

// True if no number is NaN or larger than `limit`: scaled so that the limit becomes the largest
// float, what is larger becomes infinite, and zero times a number that is not finite is not zero.
inline bool all_within(const TokenSource& source, int num_heads, int head_dim, float limit,
                       const Executor& executor) {
  constexpr int64_t kTokens = 1024;
  // A little less, so that rounding does not send the limit itself to infinity.
  const float to_largest = std::numeric_limits<float>::max() / limit * (1 - 0x1p-22f);
  const int64_t chunks = (source.num_tokens + kTokens - 1) / kTokens;
  std::atomic<bool> finite{true};
  for_each_task(executor, num_heads * chunks, [&](int64_t task, int) {
    const int64_t first = task % chunks * kTokens;
    F32 sum{};
    for (int64_t t = first; t < std::min(first + kTokens, source.num_tokens); ++t) {
      const int64_t from = task / chunks * source.head_stride + t * source.token_stride;
      for (int d = 0; d < head_dim; d += kVecLanes) {
        sum += load_as_float(source.data, source.dtype, from + d) * to_largest * 0.0f;
      }
    }
    if (!(reduce_add(sum) == 0.0f)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}
