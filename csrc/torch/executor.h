// Work on torch's own threads.
#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <limits>

#include "csrc/core/parallel.h"

namespace svdq::torch_binding {

class TorchExecutor : public Executor {
 public:
  // Threads are woken only for `numbers` worth it: a single token's tensors are faster done here.
  explicit TorchExecutor(int64_t numbers = std::numeric_limits<int64_t>::max())
      : workers_(numbers < kSerialNumbers || at::in_parallel_region() ? 1 : at::get_num_threads()) {
  }

  int workers() const override { return workers_; }

  // Workers take the next task when they are done with one, so tasks may differ in length.
  void run(int64_t num_tasks, void (*fn)(void*, int64_t, int), void* context) const override {
    const int64_t team = std::min<int64_t>(workers_, num_tasks);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, team, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
          fn(context, task, static_cast<int>(worker));
        }
      }
    });
  }

 private:
  static constexpr int64_t kSerialNumbers = 1 << 16;
  int workers_;
};

}  // namespace svdq::torch_binding
