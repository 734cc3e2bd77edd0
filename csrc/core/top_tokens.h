// The largest of a list of numbers, for the select stage: a bound from a sample leaves few
// candidates, which the standard library's selection decides among.
#pragma once

#include <cstdint>

namespace svdq {

// A bound that more than `budget` of the weights [count] most likely reach; 0 if a sample says
// nothing.
float likely_bound(const float* weights, int64_t count, int64_t budget);

// Of `candidates` [found], ascending indices of weights, keeps the `budget` of largest weight, the
// first ones of equals, in order.
void keep_largest(const float* weights, int64_t budget, int64_t found, int32_t* candidates);

}  // namespace svdq
