// Threads for the backends: the host program brings its own pool (torch's, or none), so that the library
// never starts a second one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace svdq {

class Executor {
 public:
  virtual ~Executor() = default;

  // Number of workers; task functions get the number of theirs.
  virtual int workers() const = 0;

  // Calls fn(context, task, worker) once for each task in 0 .. num_tasks - 1, in any order, and
  // waits.
  virtual void run(int64_t num_tasks, void (*fn)(void* context, int64_t task, int worker),
                   void* context) const = 0;
};

// Runs everything on the calling thread.
class SerialExecutor : public Executor {
 public:
  int workers() const override { return 1; }
  void run(int64_t num_tasks, void (*fn)(void*, int64_t, int), void* context) const override {
    for (int64_t task = 0; task < num_tasks; ++task) fn(context, task, 0);
  }
};

// Uninitialised memory aligned to a line; throws std::bad_alloc.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes);
  ~AlignedBuffer();
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  template <typename T = uint8_t>
  T* as(size_t byte_offset = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(data_) + byte_offset);
  }

 private:
  void* data_;
};

}  // namespace svdq
