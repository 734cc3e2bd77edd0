// The portable backend: compiler vectors of 16 bytes, no instruction beyond the platform's
// baseline.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "csrc/core/absorb.h"
#include "csrc/core/backend.h"
#include "csrc/core/rope_table.h"
#include "csrc/core/scalar.h"
#include "csrc/core/top_tokens.h"
#include "csrc/cpu/isa.h"

#define SVDQ_TARGET 128

namespace svdq::portable {

#include "csrc/cpu/simd-inl.h"
// Each builds on the one before.
#include "csrc/cpu/pack/project-inl.h"
#include "csrc/cpu/fit/basis-inl.h"
#include "csrc/cpu/pack/pack-inl.h"
#include "csrc/cpu/attend/scores-inl.h"
#include "csrc/cpu/attend/accumulate-inl.h"
#include "csrc/cpu/attend/absorb-inl.h"
#include "csrc/cpu/attend/plan-inl.h"
#include "csrc/cpu/attend/prepare-inl.h"
#include "csrc/cpu/attend/merge-inl.h"
#include "csrc/cpu/attend/page-inl.h"
#include "csrc/cpu/attend/attend-inl.h"
#include "csrc/cpu/select/proxy-inl.h"
#include "csrc/cpu/select/select-inl.h"
#include "csrc/cpu/select/gather-inl.h"

extern const Backend kBackend;
const Backend kBackend = {"portable", [] { return true; }, all_within, covariance, fit_quantizer,
                          pack_keys,  pack_values,         select,     gather,     attend,
                          merge};

}  // namespace svdq::portable
