// Tasks on the workers, their memory, and counts as template arguments.
#pragma once

#include <cstdint>

#include "csrc/core/parallel.h"
#include "kernels/format.h"
#include "kernels/machine/math.h"

#include "csrc/cpu/target_begin-inl.h"

namespace svdq::SVDQ_TARGET_NAME {

// Calls fn(task, worker) for each task on the executor's workers.
template <typename Fn>
inline void for_each_task(const Executor& executor, int64_t num_tasks, const Fn& fn) {
  executor.run(
      num_tasks,
      [](void* context, int64_t task, int worker) {
        (*static_cast<const Fn*>(context))(task, worker);
      },
      const_cast<Fn*>(&fn));
}

// Calls fn.template operator()<n>() for the run-time n in 1 .. kMax.
template <int kMax, typename Fn>
inline void with_count(int n, const Fn& fn) {
  if (n >= kMax) {
    fn.template operator()<kMax>();
  } else if constexpr (kMax > 1) {
    with_count<kMax - 1>(n, fn);
  }
}

// Takes `count` numbers at byte `bytes` of the memory at `base`, and advances `bytes`; a null base only measures.
template <typename T>
inline void carve(T*& to, uint8_t* base, int64_t& bytes, int64_t count) {
  to = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
  bytes += round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes);
}

}  // namespace svdq::SVDQ_TARGET_NAME

#include "csrc/cpu/target_end-inl.h"
