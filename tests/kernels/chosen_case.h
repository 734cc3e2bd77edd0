// The case of the tests named Chosen, from the environment variable SVDQ_TEST_CASE: words
// "name=value", all optional, so that a new case needs no compiler. docs/kernels.md lists the names.
#pragma once

#include <cstdlib>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "tests/core/attend_problem.h"
#include "tests/kernels/attend_device.h"

namespace svdq::testing {

class ChosenCase {
 public:
  ChosenCase() {
    const char* text = std::getenv("SVDQ_TEST_CASE");
    std::istringstream words(text ? text : "");
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      const std::string name = word.substr(0, equals);
      if (equals == std::string::npos || names().find(" " + name + " ") == std::string::npos)
        throw Error(
            join("SVDQ_TEST_CASE: '", word, "' is not name=value with a name of:", names()));
      given_[name] = word.substr(equals + 1);
    }
  }

  int head_dim() const { return number("head_dim", 64); }
  RopeMode rope() const {
    return choice<RopeMode>(
        "rope", "post",
        {{"pre", RopeMode::kPre}, {"post", RopeMode::kPost}, {"hybrid", RopeMode::kHybrid}});
  }
  DataType dtype() const { return dtype("dtype", "fp32"); }
  // By head; heads take them in turn.
  ValueBits v_bits() const { return numbers("v_bits", "4"); }
  uint64_t seed() const { return static_cast<uint64_t>(number("seed", 1)); }
  int slot() const { return number("slot", 5); }
  int tokens() const { return number("tokens", 150); }
  int position() const { return number("position", 1000); }

  // Channels of 8:4:2:1 bits, by head; heads take them in turn.
  HeadBands bands() const { return bands("bands", "4:8:4:8,0:12:4:16"); }
  // Of pre-RoPE channels, hybrid alone.
  HeadBands pre_bands() const { return bands("pre", "4:4:0:0"); }
  HeadBands bands(const std::string& name, const std::string& fallback) const {
    std::vector<Bands> kinds;
    for (const std::string& kind : split(value(name, fallback), ',')) {
      const std::vector<std::string> counts = split(kind, ':');
      if (counts.size() != kNumWidths) fail(name, kind, "channels of 8:4:2:1 bits");
      Bands bands{};
      for (int w = 0; w < kNumWidths; ++w) bands.count[w] = parse(name, counts[w]);
      kinds.push_back(bands);
    }
    HeadBands heads;
    for (int h = 0; h < number("kv_heads", 2); ++h) heads.push_back(kinds[h % kinds.size()]);
    return heads;
  }

  AttendCase attend() const {
    AttendCase c;
    c.rope = rope();
    c.head_dim = head_dim();
    c.rotary_pairs = number("rotary_dim", head_dim()) / 2;
    c.bands = bands();
    if (c.rope == RopeMode::kHybrid) c.pre_bands = pre_bands();
    c.v_bits = v_bits();
    c.group = number("group", 2);
    c.q_len = number("q_len", 1);
    c.dtype = dtype();
    const char* halves = c.dtype == DataType::kFloat16 ? "fp16" : "bf16";
    const char* same = c.dtype == DataType::kFloat32 ? "fp32" : halves;
    c.window_dtype = dtype("window_dtype", c.v_bits.of(0) == 16   ? halves
                                           : c.v_bits.of(0) == 32 ? "fp32"
                                                                  : same);
    c.cache_seqlens = numbers("kv_len", "130,70");
    c.window_lens = numbers("exact", std::to_string(c.q_len + 8));
    // One for all sequences, or one for each.
    c.window_lens.resize(c.cache_seqlens.size(), c.window_lens.back());
    if (given_.count("first_position")) {
      c.first_positions = numbers("first_position", "");
      c.first_positions.resize(c.cache_seqlens.size(), c.first_positions.back());
    }
    c.sink_tokens = number("sinks", 0);
    c.causal = number("causal", 1) != 0;
    c.gathered = number("gathered", 0) != 0;
    return c;
  }

  // Nothing: as planned for the device.
  std::optional<gpu::AttendTiling> tiling() const {
    for (const char* name : {"split_pages", "split_window", "stages", "tiles"}) {
      if (given_.count(name)) {
        const int tiles = number("tiles", 1);
        return gpu::AttendTiling{number("split_pages", 2), number("split_window", 64),
                                 number("stages", 3), tiles, tiles};
      }
    }
    return std::nullopt;
  }

 private:
  static std::string names() {
    return " head_dim kv_heads group q_len kv_len exact bands pre v_bits dtype "
           "window_dtype"
           " rope rotary_dim first_position sinks causal gathered split_pages split_window stages "
           "tiles slot"
           " tokens position seed ";
  }

  [[noreturn]] static void fail(const std::string& name, const std::string& got,
                                const std::string& expected) {
    throw Error(join("SVDQ_TEST_CASE: ", name, "=", got, ", expected ", expected));
  }
  static std::vector<std::string> split(const std::string& text, char at) {
    std::istringstream stream(text);
    std::vector<std::string> parts;
    for (std::string part; std::getline(stream, part, at);) parts.push_back(part);
    return parts;
  }
  static int parse(const std::string& name, const std::string& text) {
    size_t used = 0;
    int result = 0;
    try {
      result = std::stoi(text, &used);
    } catch (const std::exception&) {
    }
    if (used == 0 || used != text.size()) fail(name, text, "a number");
    return result;
  }

  std::string value(const std::string& name, const std::string& fallback) const {
    const auto found = given_.find(name);
    return found == given_.end() ? fallback : found->second;
  }
  int number(const std::string& name, int fallback) const {
    return parse(name, value(name, std::to_string(fallback)));
  }
  std::vector<int> numbers(const std::string& name, const std::string& fallback) const {
    std::vector<int> all;
    for (const std::string& part : split(value(name, fallback), ','))
      all.push_back(parse(name, part));
    if (all.empty()) fail(name, "", "numbers");
    return all;
  }
  template <typename T>
  T choice(const std::string& name, const std::string& fallback,
           const std::map<std::string, T>& choices) const {
    const std::string got = value(name, fallback);
    std::string known;
    for (const auto& [word, meaning] : choices) {
      if (word == got) return meaning;
      known += (known.empty() ? "" : " or ") + word;
    }
    fail(name, got, known);
  }
  DataType dtype(const std::string& name, const std::string& fallback) const {
    return choice<DataType>(name, fallback,
                            {{"fp32", DataType::kFloat32},
                             {"bf16", DataType::kBFloat16},
                             {"fp16", DataType::kFloat16}});
  }

  std::map<std::string, std::string> given_;
};

}  // namespace svdq::testing
