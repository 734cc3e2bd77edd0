// Products of rows of numbers (keys of the window, rows of the basis) with the 8 query rows of a tile, in float. A warp
// takes several rows at once, so that their loads are in flight together: what few rows cost is latency.
#pragma once

#include "kernels/attend/plan.cuh"

namespace svdq::device {

// Query rows of a tile in shared memory.
template <int kDim>
struct QueryRows {
  alignas(16) float row[kRowTile][kDim];
};

// True if four numbers can be loaded at once from any row, of rows that start at multiples of four numbers.
SVDQ_DEVICE bool aligned_quads(const void* data, DataType dtype) {
  return reinterpret_cast<uintptr_t>(data) % (dtype == DataType::kFloat32 ? 16 : 8) == 0;
}

// Calls fn(load) with a function that loads numbers index .. index + 3.
template <typename Fn>
SVDQ_DEVICE void with_quads(const void* data, DataType dtype, bool aligned, const Fn& fn) {
  if (!aligned) {
    fn([=](int64_t index) {
      Floats4 four;
      SVDQ_UNROLL
      for (int i = 0; i < 4; ++i) four.x[i] = load_number(data, dtype, index + i);
      return four;
    });
    return;
  }
  with_dtype(dtype, [&]<DataType kType>() {
    fn([=](int64_t index) { return load_four_as<kType>(data, index); });
  });
}

// Loads the queries of a tile in log2 units of score, rows that do not exist as zeros; a barrier must follow. A warp has
// two rows, whose loads are in flight together.
template <int kDim>
SVDQ_DEVICE void load_queries(QueryRows<kDim>& s, const AttendParams& p, const BlockRows& rows) {
  constexpr int kOwn = kRowTile / kAttendWarps;
  const int dim = p.keys.layout.head_dim;
  const int64_t first = (rows.sequence_head * query_rows(p) + rows.first) * dim;
  const bool aligned = aligned_quads(p.queries.data, p.queries.dtype);
  with_quads(p.queries.data, p.queries.dtype, aligned, [&](const auto& load_quad) {
    for (int d = lane_index() * 4; d < dim; d += kWarpSize * 4) {
      Floats4 query[kOwn];
      SVDQ_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int row = warp_index() + i * kAttendWarps;
        // In place of rows that do not exist the KV head's first, which does.
        query[i] = load_quad(first + (row < rows.count ? row : -rows.first) * dim + d);
      }
      SVDQ_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        const int row = warp_index() + i * kAttendWarps;
        SVDQ_UNROLL
        for (int e = 0; e < 4; ++e) {
          const float x = without_gain(p, rows.sequence_head, d + e, query[i].x[e]);
          query[i].x[e] = row < rows.count ? x * p.queries.sm_scale * kLog2E : 0.0f;
        }
        store(reinterpret_cast<Floats4*>(&s.row[row][d]), query[i]);
      }
    }
  });
}

// fn(i, product) for rows 0 .. count - 1, of which `load_row(i, d)` gives channels d .. d + 3: lane l has the product
// with query row l / 4. All lanes of a warp take part; kAtOnce rows are in flight.
template <int kAtOnce, int kDim, typename Load, typename Fn>
SVDQ_DEVICE void dot_rows(const QueryRows<kDim>& query, int dim, int count, const Load& load_row,
                          const Fn& fn) {
  for (int first = 0; first < count; first += kAtOnce) {
    float products[kAtOnce][kRowTile] = {};
    for (int d = lane_index() * 4; d < dim; d += kWarpSize * 4) {
      Floats4 row[kAtOnce];
      SVDQ_UNROLL
      for (int i = 0; i < kAtOnce; ++i)
        row[i] = load_row(first + i < count ? first + i : count - 1, d);
      SVDQ_UNROLL
      for (int r = 0; r < kRowTile; ++r) {
        const Floats4 q = load(reinterpret_cast<const Floats4*>(&query.row[r][d]));
        SVDQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          SVDQ_UNROLL
          for (int e = 0; e < 4; ++e) products[i][r] = fused(row[i].x[e], q.x[e], products[i][r]);
        }
      }
    }
    SVDQ_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const float sum = sum_rows(products[i]);
      if (first + i < count) fn(first + i, sum);
    }
  }
}

}  // namespace svdq::device
