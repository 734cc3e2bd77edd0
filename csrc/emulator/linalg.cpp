#include "csrc/emulator/linalg.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "csrc/emulator/emulator.h"
#include "csrc/emulator/global_memory.h"

namespace svdq::emulator {
namespace {

template <typename T>
void touch(const T* data, int64_t count, emulator::Access access, const char* name) {
  const std::string error = emulator::check_global(data, count * sizeof(T), access);
  if (!error.empty()) throw emulator::Error(std::string(name) + ": " + error);
}

// Turns rows and columns i and j of the symmetric matrix, and rows i and j of `vectors`, by the
// angle that makes element (i, j) zero (Jacobi).
void turn_pair(std::vector<double>& matrix, std::vector<double>& vectors, int dim, int i, int j) {
  const double off = matrix[i * dim + j];
  if (off == 0) return;
  const double slope = (matrix[j * dim + j] - matrix[i * dim + i]) / (2 * off);
  const double tangent = std::copysign(1.0, slope) / (std::fabs(slope) + std::hypot(1.0, slope));
  const double c = 1 / std::hypot(1.0, tangent), s = tangent * c;
  const auto turn_rows = [&](std::vector<double>& rows) {
    for (int k = 0; k < dim; ++k) {
      const double x = rows[i * dim + k], y = rows[j * dim + k];
      rows[i * dim + k] = x * c - y * s;
      rows[j * dim + k] = x * s + y * c;
    }
  };
  turn_rows(matrix);
  turn_rows(vectors);
  for (int k = 0; k < dim; ++k) {
    const double x = matrix[k * dim + i], y = matrix[k * dim + j];
    matrix[k * dim + i] = x * c - y * s;
    matrix[k * dim + j] = x * s + y * c;
  }
}

// True if the matrix became diagonal: the squares off the diagonal are negligible.
// NaN never does.
bool diagonalise(std::vector<double>& matrix, std::vector<double>& vectors, int dim) {
  constexpr int kSweeps = 30;  // each squares the rest, once it is small; ten are many
  const double total = std::inner_product(matrix.begin(), matrix.end(), matrix.begin(), 0.0);
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double rest = 0;
    for (int i = 0; i < dim; ++i) {
      for (int j = i + 1; j < dim; ++j) rest += matrix[i * dim + j] * matrix[i * dim + j];
    }
    if (rest <= 1e-28 * total) return true;
    for (int i = 0; i < dim; ++i) {
      for (int j = i + 1; j < dim; ++j) turn_pair(matrix, vectors, dim, i, j);
    }
  }
  return false;
}

}  // namespace

void add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram, bool checked) {
  if (checked) {
    touch(rows, heads * tokens * dim, emulator::Access::kRead, "add_gram");
    touch(gram, int64_t{heads} * dim * dim, emulator::Access::kRead, "add_gram");
  }
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      const float* row = rows + (h * tokens + t) * dim;
      for (int i = 0; i < dim; ++i) {
        float* to = gram + (h * dim + i) * dim;
        for (int j = 0; j < dim; ++j) to[j] += row[i] * row[j];
      }
    }
  }
}

void eigenvectors(float* matrices, float* values, int heads, int dim, int* info, bool checked) {
  if (checked) {
    touch(matrices, int64_t{heads} * dim * dim, emulator::Access::kRead, "eigenvectors");
    touch(values, int64_t{heads} * dim, emulator::Access::kWrite, "eigenvectors");
    touch(info, heads, emulator::Access::kWrite, "eigenvectors");
  }
  for (int64_t h = 0; h < heads; ++h) {
    float* out = matrices + h * dim * dim;
    std::vector<double> matrix(out, out + int64_t{dim} * dim), vectors(matrix.size());
    for (int i = 0; i < dim; ++i) vectors[i * dim + i] = 1;
    info[h] = diagonalise(matrix, vectors, dim) ? 0 : 1;
    if (info[h]) continue;  // nothing to sort
    std::vector<int> order(dim);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return matrix[a * dim + a] < matrix[b * dim + b]; });
    for (int i = 0; i < dim; ++i) {
      values[h * dim + i] = static_cast<float>(matrix[order[i] * dim + order[i]]);
      for (int d = 0; d < dim; ++d)
        out[i * dim + d] = static_cast<float>(vectors[order[i] * dim + d]);
    }
  }
}

}  // namespace svdq::emulator
