// Errors of the torch-free core: one exception type whose message says what was expected and what
// came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace svdq {

class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

template <typename... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace svdq

// Throws svdq::Error with the remaining arguments joined into its message unless the condition
// holds.
#define SVDQ_CHECK(condition, ...)                                    \
  do {                                                                \
    if (!(condition)) throw ::svdq::Error(::svdq::join(__VA_ARGS__)); \
  } while (false)
