#include "csrc/emulator/global_memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#include "csrc/core/error.h"
#include "csrc/emulator/emulator.h"

namespace svdq::emulator {
namespace {

constexpr size_t kRedZone = 256;  // bytes; also the alignment of cudaMalloc
constexpr uint8_t kRedZoneByte = 0xb5;

struct Entry {
  size_t bytes;
  std::vector<bool> written;  // empty: all of them
};

// One lock for everything: launches of several host threads share buffers.
std::mutex registry_lock;
std::map<uintptr_t, Entry> registry;
std::map<const uint8_t*, size_t> memories;

uintptr_t address(const void* data) { return reinterpret_cast<uintptr_t>(data); }

std::string describe_neighbours(uintptr_t at) {
  auto next = registry.upper_bound(at);
  std::string text;
  if (next != registry.begin()) {
    const auto& [begin, entry] = *std::prev(next);
    text += join(", ", at - begin - entry.bytes, " bytes after the end of a buffer of ",
                 entry.bytes, " bytes");
  }
  if (next != registry.end()) text += join(", ", next->first - at, " bytes before another buffer");
  return text;
}

}  // namespace

std::string check_global(const void* data, size_t bytes, Access access) {
  const std::lock_guard<std::mutex> guard(registry_lock);
  const uintptr_t at = address(data);
  auto found = registry.upper_bound(at);
  if (found == registry.begin())
    return join("out of bounds: no buffer at this address", describe_neighbours(at));
  --found;
  const uintptr_t offset = at - found->first;
  Entry& entry = found->second;
  if (offset >= entry.bytes)
    return join("out of bounds: no buffer at this address", describe_neighbours(at));
  if (offset + bytes > entry.bytes)
    return join("out of bounds: bytes ", offset, " to ", offset + bytes, " of a buffer of ",
                entry.bytes, " bytes");
  if (entry.written.empty()) return {};
  const auto first = entry.written.begin() + static_cast<int64_t>(offset);
  const auto last = first + static_cast<int64_t>(bytes);
  if (access == Access::kWrite) {
    std::fill(first, last, true);
  } else if (std::find(first, last, false) != last) {
    return join("nobody wrote byte ", std::find(first, last, false) - entry.written.begin(),
                " of a buffer of ", entry.bytes, " bytes");
  }
  return {};
}

Region::Region(const void* data, size_t bytes, bool written) : data_(data) {
  if (bytes == 0) return;
  const std::lock_guard<std::mutex> guard(registry_lock);
  registry[address(data)] = {bytes, written ? std::vector<bool>() : std::vector<bool>(bytes)};
}

Region::~Region() {
  const std::lock_guard<std::mutex> guard(registry_lock);
  registry.erase(address(data_));
}

Memory::Memory(size_t bytes, bool written) : bytes_(bytes) {
  const size_t end = (bytes + kRedZone - 1) / kRedZone * kRedZone;  // the end zone starts at bytes
  uint8_t* raw =
      static_cast<uint8_t*>(::operator new(end + 2 * kRedZone, std::align_val_t{kRedZone}));
  std::memset(raw, kRedZoneByte, end + 2 * kRedZone);
  data_ = raw + kRedZone;
  std::memset(data_, 0xff, bytes);  // NaN
  const std::lock_guard<std::mutex> guard(registry_lock);
  memories[data_] = bytes;
  registry[address(data_)] = {bytes, written ? std::vector<bool>() : std::vector<bool>(bytes)};
}

Memory::~Memory() {
  {
    const std::lock_guard<std::mutex> guard(registry_lock);
    memories.erase(data_);
    registry.erase(address(data_));
  }
  ::operator delete(data_ - kRedZone, std::align_val_t{kRedZone});
}

void check_red_zones(const char* name) {
  const std::lock_guard<std::mutex> guard(registry_lock);
  const auto changed = [](const uint8_t* first, const uint8_t* last) {
    return std::any_of(first, last, [](uint8_t byte) { return byte != kRedZoneByte; });
  };
  for (const auto& [data, bytes] : memories) {
    if (changed(data - kRedZone, data))
      throw Error(join("kernel ", name, " wrote before a buffer of ", bytes, " bytes"));
    if (changed(data + bytes, data + bytes + kRedZone))
      throw Error(join("kernel ", name, " wrote past a buffer of ", bytes, " bytes"));
  }
}

}  // namespace svdq::emulator
