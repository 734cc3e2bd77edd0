#include "csrc/emulator/recorder.h"

#include <algorithm>
#include <array>
#include <set>

#include "csrc/core/error.h"

namespace svdq::emulator {
namespace {

constexpr int kBanks = 32, kBankBytes = 4, kSectorBytes = 32;

// Cycles that shared memory needs: lanes take turns in groups of 32, 16 or 8 so that no turn moves
// more than 128 bytes; within a turn each bank serves one word, to any number of lanes.
int64_t shared_cycles(const std::vector<const LaneAccess*>& request) {
  const int lanes_per_turn = 128 / std::max(kBankBytes, request[0]->bytes);
  int64_t cycles = 0;
  for (int first = 0; first < kBanks; first += lanes_per_turn) {
    std::set<uintptr_t> words;
    for (const LaneAccess* access : request) {
      if (access->lane / lanes_per_turn * lanes_per_turn != first) continue;
      for (uintptr_t at = access->address / kBankBytes;
           at <= (access->address + access->bytes - 1) / kBankBytes; ++at)
        words.insert(at);
    }
    std::array<int64_t, kBanks> load{};
    for (uintptr_t word : words) ++load[word % kBanks];
    cycles += *std::max_element(load.begin(), load.end());
  }
  return cycles;
}

// Turns that have a lane at all.
int64_t ideal_cycles(const std::vector<const LaneAccess*>& request) {
  const int lanes_per_turn = 128 / std::max(kBankBytes, request[0]->bytes);
  std::set<int> turns;
  for (const LaneAccess* access : request) turns.insert(access->lane / lanes_per_turn);
  return static_cast<int64_t>(turns.size());
}

}  // namespace

Recorder::Key Recorder::key(const LaneAccess& a) {
  return {a.site.file_name(),
          a.site.function_name(),
          a.site.line(),
          a.site.column(),
          a.shared,
          a.store,
          a.bytes};
}

void Recorder::flush(int warp) {
  std::vector<LaneAccess>& all = pending_[warp];
  if (all.empty()) return;
  // (site, occurrence within the lane) -> the lanes' accesses.
  std::map<Key, std::vector<std::vector<const LaneAccess*>>> requests;
  std::map<Key, std::array<int, kBanks>> occurrences;
  for (const LaneAccess& access : all) {
    const Key site = key(access);
    const size_t n = static_cast<size_t>(occurrences[site][access.lane]++);
    auto& list = requests[site];
    if (list.size() <= n) list.resize(n + 1);
    list[n].push_back(&access);
  }
  for (const auto& [site, list] : requests) {
    for (const auto& request : list) count(request);
  }
  all.clear();
}

void Recorder::count(const std::vector<const LaneAccess*>& request) {
  const LaneAccess& first = *request[0];
  const auto [found, added] = sites_.try_emplace(key(first), counters_.sites.size());
  if (added) counters_.sites.push_back({first.site, first.shared, first.store, first.bytes});
  SiteCounters& site = counters_.sites[found->second];
  site.requests += 1;
  std::set<uintptr_t> bytes_seen, sectors;
  for (const LaneAccess* access : request) {
    site.bytes += access->bytes;
    for (uintptr_t at = access->address; at < access->address + access->bytes; at += 1) {
      if (first.shared) break;
      bytes_seen.insert(at);
      sectors.insert(at / kSectorBytes);
    }
  }
  if (first.shared) {
    site.transfers += shared_cycles(request);
    site.ideal += ideal_cycles(request);
  } else {
    site.transfers += static_cast<int64_t>(sectors.size());
    site.ideal += static_cast<int64_t>((bytes_seen.size() + kSectorBytes - 1) / kSectorBytes);
  }
}

std::string SiteCounters::where() const {
  return join(site.file_name(), ":", site.line(), shared ? " shared " : " global ",
              store ? "store of " : "load of ", width, " bytes in ", site.function_name());
}

namespace {
int64_t excess(const std::vector<SiteCounters>& sites, bool shared, int width) {
  int64_t sum = 0;
  for (const SiteCounters& site : sites) {
    if (site.shared == shared && site.width >= width) sum += site.transfers - site.ideal;
  }
  return sum;
}
}  // namespace

int64_t Counters::bank_conflicts(int width) const { return excess(sites, true, width); }
int64_t Counters::wasted_sectors(int width) const { return excess(sites, false, width); }

}  // namespace svdq::emulator
