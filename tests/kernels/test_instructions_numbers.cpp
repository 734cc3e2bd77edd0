// Conversions and arithmetic of the device layer against plain loops, under emulation and by nvcc.
#include "tests/kernels/device_test.h"

#include <cmath>
#include <random>

#include "csrc/core/scalar.h"
#include "kernels/machine/numbers.cuh"

namespace svdq::device {
namespace {

using testing::DeviceArray;

class NumberInstructions : public testing::KernelTest {};

// --- numbers ---
SVDQ_KERNEL(128) numbers_kernel(const float* x, float* out, uint32_t* bits) {
  const int i = block_x() * 128 + thread_index();
  const float v = load(&x[i]);
  store(&out[2 * i], exp2_fast(v));
  store(&out[2 * i + 1], log2_fast(exp2_fast(v)));
  store(&bits[5 * i], uint32_t{float_to_half(v)} | uint32_t{float_to_bfloat16(v)} << 16);
  store(&bits[5 * i + 1], pack_half2(v, 2 * v));
  store(&bits[5 * i + 2], pack_bfloat162(v, 2 * v));
  store(&bits[5 * i + 3],
        half2_fma(pack_half2(v, 3.0f), pack_half2(1.5f, v), pack_half2(-v, 0.25f)));
  store(&bits[5 * i + 4],
        permute_bytes(0x33221100u + static_cast<uint32_t>(round_to_int(v)), 0x77665544u, 0x6241));
}

SVDQ_KERNEL(128)
bytes_kernel(const uint32_t* codes, const uint32_t* weights, int* sums, const float* angles,
             Floats2* rotates) {
  const int i = block_x() * 128 + thread_index();
  store(&sums[i], dot4(load(&codes[i]), load(&weights[i]), i - 100));
  Floats2 turn;
  sine_cosine_fast(load(&angles[i]), turn.y, turn.x);
  store(&rotates[i], turn);
}

TEST_P(NumberInstructions, DotProductsOfBytesAndFastSines) {
  constexpr int kCount = 1024;
  std::vector<uint32_t> a(kCount), b(kCount);
  std::vector<float> x(kCount);
  for (uint32_t i = 0; i < kCount; ++i) {
    a[i] = i * 2654435761u;
    b[i] = i * 2246822519u + 12345;
    x[i] = static_cast<float>(3.14159 * (2.0 * i / kCount - 1));
  }
  const DeviceArray<uint32_t> codes(a), weights(b);
  const DeviceArray<float> angles(x);
  const DeviceArray<int> sums(kCount);
  const DeviceArray<Floats2> rotates(kCount);
  launch("bytes", {kCount / 128, 1, 1, 128, 0}, bytes_kernel, codes.data(), weights.data(),
         sums.data(), angles.data(), rotates.data());
  const auto got = sums.read();
  const auto rotated = rotates.read();
  for (int i = 0; i < kCount; ++i) {
    int sum = i - 100;
    for (int e = 0; e < 4; ++e)
      sum += static_cast<int>(a[i] >> (8 * e) & 255) * static_cast<int8_t>(b[i] >> (8 * e));
    ASSERT_EQ(got[i], sum);
    // sin.approx and cos.approx: 2^-20.9 from -pi to pi (PTX ISA).
    ASSERT_NEAR(rotated[i].x, std::cos(double{x[i]}), 0x1p-20);
    ASSERT_NEAR(rotated[i].y, std::sin(double{x[i]}), 0x1p-20);
  }
}

TEST_P(NumberInstructions, Numbers) {
  constexpr int kCount = 1024;
  std::vector<float> x(kCount);
  for (int i = 0; i < kCount; ++i)
    x[i] = static_cast<float>(-60 + 120 * ((i * 7919) % kCount) / double(kCount));
  const DeviceArray<float> from(x), out(2 * kCount);
  const DeviceArray<uint32_t> bits(5 * kCount);
  launch("numbers", {kCount / 128, 1, 1, 128, 0}, numbers_kernel, from.data(), out.data(),
         bits.data());
  const auto numbers = out.read();
  const auto words = bits.read();
  const auto halves = [](float low, float high) {
    return svdq::float_to_half(low) | uint32_t{svdq::float_to_half(high)} << 16;
  };
  for (int i = 0; i < kCount; ++i) {
    const float v = x[i], h = svdq::half_to_float(svdq::float_to_half(v));
    // ex2.approx: relative error up to 2^-22.5; lg2.approx: absolute error up to 2^-22 (CUDA
    // guide), where the argument's own error of 2^-22.5 adds 1.45 * 2^-22.5, and rounding a result
    // of up to 60 adds 2^-19.
    ASSERT_NEAR(numbers[2 * i] / std::exp2(double{v}), 1.0, 0x1p-22) << v;
    ASSERT_NEAR(numbers[2 * i + 1], v, 0x1p-18) << v;
    ASSERT_EQ(words[5 * i], svdq::float_to_half(v) | uint32_t{svdq::float_to_bfloat16(v)} << 16)
        << v;
    ASSERT_EQ(words[5 * i + 1], halves(v, 2 * v)) << v;
    ASSERT_EQ(words[5 * i + 2],
              svdq::float_to_bfloat16(v) | uint32_t{svdq::float_to_bfloat16(2 * v)} << 16)
        << v;
    // 1.5 h - h and 3 h + 1/4 are exact in float before they are rounded to half.
    ASSERT_EQ(words[5 * i + 3], halves(1.5f * h - h, 3 * h + 0.25f)) << v;
    const uint32_t low = 0x33221100u + static_cast<uint32_t>(static_cast<int>(std::nearbyint(v)));
    ASSERT_EQ(words[5 * i + 4],
              (low >> 8 & 0xff) | 0x44u << 8 | (low >> 16 & 0xff) << 16 | 0x66u << 24)
        << v;
  }
}

SVDQ_KERNEL_TESTS(NumberInstructions);

}  // namespace
}  // namespace svdq::device
