// The packed format: addresses of codes, golden bytes, and codes that fill pages without overlap.
#include "tests/core/page_pool.h"
#include "tests/core/reference.h"

namespace svdq {
namespace {

// These numbers are the format: a change here needs a new kFormatVersion.
TEST(Format, GoldenAddresses) {
  struct Golden {
    CodeAddress place;
    int64_t byte;
    int shift;
  };
  const Golden places[] = {
      {key_code_address(8, 0, 0), 0, 0},       {key_code_address(8, 3, 15), 63, 0},
      {key_code_address(8, 4, 16), 320, 0},    {key_code_address(8, 11, 63), 767, 0},
      {key_code_address(4, 0, 16), 0, 4},      {key_code_address(4, 1, 32), 65, 0},
      {key_code_address(4, 5, 17), 133, 4},    {key_code_address(2, 2, 0), 2, 0},
      {key_code_address(2, 2, 63), 62, 6},     {key_code_address(2, 6, 40), 98, 4},
      {key_code_address(1, 4, 0), 0, 4},       {key_code_address(1, 7, 63), 63, 7},
      {key_code_address(1, 9, 20), 81, 1},     {value_code_address(4, 0, 0), 0, 0},
      {value_code_address(4, 0, 4), 0, 4},     {value_code_address(4, 17, 6), 518, 4},
      {value_code_address(2, 15, 3), 63, 0},   {value_code_address(2, 1, 14), 6, 6},
      {value_code_address(2, 16, 16), 320, 0},
  };
  for (const Golden& golden : places) {
    EXPECT_EQ(golden.place.byte, golden.byte);
    EXPECT_EQ(golden.place.shift, golden.shift);
  }
}

TEST(Format, GoldenBytes) {
  // Two tokens of a 4-bit band of four channels: token 0 in low nibbles, token 16 in high ones.
  std::vector<uint8_t> page(Bands{{0, 4, 0, 0}}.page_bytes(), 0);
  for (int channel = 0; channel < 4; ++channel) {
    put_code(page.data(), key_code_address(4, channel, 0), 4, channel + 1);
    put_code(page.data(), key_code_address(4, channel, 16), 4, 15 - channel);
  }
  std::vector<uint8_t> expected(128, 0);
  expected[0] = 0xf1, expected[1] = 0xe2, expected[2] = 0xd3, expected[3] = 0xc4;
  EXPECT_EQ(page, expected);
}

TEST(Format, GoldenSizes) {
  EXPECT_EQ(kFormatVersion, 3);
  EXPECT_EQ((Bands{{8, 16, 16, 8}}.page_bytes()), 64 * (8 + 8 + 4 + 1));
  EXPECT_EQ((ValueLayout{4, 96}.page_bytes()), 64 * (1 + 48));
  EXPECT_EQ((ValueLayout{3, 128}.page_bytes()), 64 * (1 + 48));
  EXPECT_EQ((ValueLayout{2, 128}.code_offset()), 64);
  EXPECT_EQ((ValueLayout{3, 128}.high_plane_offset()), 64 * (1 + 32));
  EXPECT_EQ((ValueLayout{32, 64}.code_offset()), 0);
  EXPECT_EQ((ValueLayout{32, 64}.page_bytes()), 64 * 64 * 4);
}

// Low bits of a 3-bit code in the first plane, the high one in the second.
TEST(Format, GoldenPlanes) {
  const ValueLayout value{3, 16};
  std::vector<uint8_t> page(value.page_bytes(), 0), expected = page;
  testing::put_value_code(page.data(), value, 2, 9, 6);
  testing::put_value_code(page.data(), value, 15, 63, 5);
  expected[64 + 2 * 4 + 1] = 2 << 4;                 // quad 2: unit 2 of line 0
  expected[64 + 4 * 64 + 2 * 4 + 1] = 1 << 2;        // unit 2 of line 0
  expected[64 + 3 * 64 + 15 * 4 + 3] = 1 << 6;       // quad 15: unit 3 of line 3
  expected[64 + 4 * 64 + 64 + 15 * 4 + 3] = 1 << 7;  // unit 7 of line 1
  EXPECT_EQ(page, expected);
  EXPECT_EQ(get_value_code(page.data(), value, 2, 9), 6);
  EXPECT_EQ(get_value_code(page.data(), value, 15, 63), 5);
}

// Every finite half that is not negative goes to the nearest scale, the even one of two equally near.
TEST(Format, ScalesAreRoundedToNearest) {
  const auto scale = [](int byte) { return half_to_float(scale_as_half(byte)); };
  for (int half = 0; half < 0x7c00; ++half) {
    const float exact = half_to_float(static_cast<uint16_t>(half));
    const int byte = scale_byte(static_cast<uint16_t>(half));
    ASSERT_LE(byte, kLargestScale);
    const float error = std::fabs(scale(byte) - exact);
    if (byte > 0) {
      const float below = std::fabs(scale(byte - 1) - exact);
      ASSERT_TRUE(error < below || (error == below && byte % 2 == 0)) << half;
    }
    if (byte < kLargestScale) {
      const float above = std::fabs(scale(byte + 1) - exact);
      ASSERT_TRUE(error < above || (error == above && byte % 2 == 0)) << half;
    }
  }
}

// Rows of the rotation are orthonormal for every head_dim.
TEST(Format, TheRotationIsOrthogonal) {
  for (int dim : {16, 48, 64, 80, 96, 112, 128, 256, 320}) {
    const reference::Row& q = reference::rotation_matrix(dim);
    for (int r = 0; r < dim; ++r) {
      for (int s = 0; s <= r; ++s) {
        double product = 0;
        for (int d = 0; d < dim; ++d) product += q[r * dim + d] * q[s * dim + d];
        ASSERT_NEAR(product, r == s, 1e-12) << dim << ": rows " << r << " and " << s;
      }
    }
  }
}

using AddressOf = CodeAddress (*)(int width, int channel, int token);

// Every bit of the page belongs to exactly one code.
void expect_bijective(AddressOf address, int width, int num_channels) {
  std::vector<uint8_t> used(num_channels * kPageTokens * width / 8, 0);
  for (int channel = 0; channel < num_channels; ++channel) {
    for (int token = 0; token < kPageTokens; ++token) {
      const CodeAddress at = address(width, channel, token);
      ASSERT_GE(at.byte, 0);
      ASSERT_LT(at.byte, static_cast<int64_t>(used.size()))
          << "channel " << channel << " token " << token;
      ASSERT_LE(at.shift + width, 8);
      const int bits = ((1 << width) - 1) << at.shift;
      ASSERT_EQ(used[at.byte] & bits, 0) << "channel " << channel << " token " << token;
      used[at.byte] = static_cast<uint8_t>(used[at.byte] | bits);
    }
  }
  for (uint8_t bits : used) ASSERT_EQ(bits, 0xff);
}

TEST(Format, KeyCodesFillEveryBand) {
  for (int width : kWidths) {
    for (int channels = band_granularity(width); channels <= kMaxHeadDim;
         channels += band_granularity(width)) {
      SCOPED_TRACE(::testing::Message() << width << " bits, " << channels << " channels");
      expect_bijective(key_code_address, width, channels);
    }
  }
}

TEST(Format, ValueCodesFillEveryPage) {
  for (int width : {1, 2, 4}) {
    for (int head_dim = kLanes; head_dim <= kMaxHeadDim; head_dim += kLanes) {
      SCOPED_TRACE(::testing::Message() << width << " bits, head_dim " << head_dim);
      expect_bijective(value_code_address, width, head_dim);
    }
  }
}

TEST(Format, PutAndGetEveryCodeAndLeaveTheRest) {
  testing::Random random(1);
  for (int width : kWidths) {
    std::vector<uint8_t> page(8 * kPageTokens * width / 8);
    random.fill(page);
    for (int channel = 0; channel < 8; ++channel) {
      for (int token = 0; token < kPageTokens; ++token) {
        const CodeAddress at = key_code_address(width, channel, token);
        const std::vector<uint8_t> before = page;
        for (int code = 0; code < 1 << width; ++code) {
          put_code(page.data(), at, width, code);
          ASSERT_EQ(get_code(page.data(), at, width), code);
        }
        put_code(page.data(), at, width, get_code(before.data(), at, width));
        ASSERT_EQ(page, before) << width << " bits, channel " << channel << " token " << token;
      }
    }
  }
}

}  // namespace
}  // namespace svdq
