#include "csrc/emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace svdq::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 * 1024;  // sanitized frames are large

void start_switch(void** fake_stack, const void* bottom, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
}
void finish_switch(void* fake_stack, const void** bottom, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
}
void forget_frames(const void* bottom, size_t bytes) {
  __asan_unpoison_memory_region(bottom, bytes);
}
#else
constexpr size_t kStackBytes = 128 * 1024;

void start_switch(void**, const void*, size_t) {}
void finish_switch(void*, const void**, size_t*) {}
void forget_frames(const void*, size_t) {}
#endif

// Boost takes the stack from an allocator; ours outlives the fiber.
struct Preallocated {
  Stack* stack;
  boost::context::stack_context allocate() {
    boost::context::stack_context context;
    context.size = Stack::bytes();
    context.sp = stack->bottom() + Stack::bytes();
    return context;
  }
  void deallocate(boost::context::stack_context&) {}
};

}  // namespace

size_t Stack::bytes() { return kStackBytes; }

Stack::Stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* pages = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  mprotect(pages, guard, PROT_NONE);
  bottom_ = static_cast<uint8_t*>(pages) + guard;
}

Stack::~Stack() {
  forget_frames(bottom_, kStackBytes);
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(bottom_ - guard, guard + kStackBytes);
}

Fiber::Fiber(Stack& stack, std::function<void()> fn)
    : fiber_(std::allocator_arg, Preallocated{&stack},
             [this, fn = std::move(fn)](boost::context::fiber&& caller) {
               caller_ = std::move(caller);
               finish_switch(nullptr, &caller_bottom_, &caller_bytes_);
               fn();
               start_switch(nullptr, caller_bottom_, caller_bytes_);
               return std::move(caller_);
             }),
      stack_(&stack) {}

void Fiber::resume() {
  start_switch(&caller_fake_stack_, stack_->bottom(), kStackBytes);
  fiber_ = std::move(fiber_).resume();
  finish_switch(caller_fake_stack_, nullptr, nullptr);
}

void Fiber::suspend() {
  start_switch(&own_fake_stack_, caller_bottom_, caller_bytes_);
  caller_ = std::move(caller_).resume();
  finish_switch(own_fake_stack_, &caller_bottom_, &caller_bytes_);
}

}  // namespace svdq::emulator
