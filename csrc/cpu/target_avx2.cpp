// The avx2 backend: the kernels compiled for avx2,fma,f16c, used only where the processor has it.
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

#if defined(__x86_64__)
#include <immintrin.h>

// Everything below, and nothing above, is compiled for the target; build flags stay at the
// platform's baseline.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define SVDQ_TARGET 256

namespace svdq::avx2 {

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
const Backend kBackend = {"avx2",        cpu_has_avx2, all_within,  covariance,
                          fit_quantizer, pack_keys,    pack_values, select,
                          gather,        attend,       merge};

}  // namespace svdq::avx2

#pragma GCC pop_options
#endif
