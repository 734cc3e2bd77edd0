// Fibers on Boost.Context, with stacks that are reused and with AddressSanitizer told of every
// switch.
#pragma once

#include <boost/context/fiber.hpp>
#include <cstddef>
#include <functional>

namespace svdq::emulator {

// Memory for one fiber's stack: pages of its own, with an inaccessible one below them.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  uint8_t* bottom() const { return bottom_; }
  static size_t bytes();

 private:
  uint8_t* bottom_;
};

// Runs a function that may stop in its middle. The function must not throw.
class Fiber {
 public:
  Fiber(Stack& stack, std::function<void()> fn);

  void resume();   // runs the function until it suspends or ends
  void suspend();  // called by the function

 private:
  boost::context::fiber fiber_;
  boost::context::fiber caller_;
  Stack* stack_;
  // AddressSanitizer's view of the two stacks.
  void* caller_fake_stack_ = nullptr;
  void* own_fake_stack_ = nullptr;
  const void* caller_bottom_ = nullptr;
  size_t caller_bytes_ = 0;
};

}  // namespace svdq::emulator
