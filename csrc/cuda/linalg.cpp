#include "csrc/cuda/linalg.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <map>
#include <memory>

#include "csrc/cuda/status.h"

namespace svdq::cuda {
namespace {

void check(cublasStatus_t status, const char* what) {
  SVDQ_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLAS: ", what, ": ",
             cublasGetStatusString(status));
}

void check(cusolverStatus_t status, const char* what) {
  SVDQ_CHECK(status == CUSOLVER_STATUS_SUCCESS, "cuSOLVER: ", what, ": status ",
             static_cast<int>(status));
}

template <typename Handle, auto kCreate, auto kDestroy>
class Owned {
 public:
  explicit Owned(const char* what) { check(kCreate(&handle_), what); }
  ~Owned() { kDestroy(handle_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Handle get() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

// Creating a handle costs milliseconds and memory, so each thread keeps one for each device; threads
// do not share any, since a handle remembers its stream.
struct Handles {
  Owned<cublasHandle_t, cublasCreate, cublasDestroy> blas{"create a handle"};
  Owned<cusolverDnHandle_t, cusolverDnCreate, cusolverDnDestroy> solver{"create a handle"};
  Owned<cusolverDnParams_t, cusolverDnCreateParams, cusolverDnDestroyParams> params{
      "create parameters"};
};

Handles& handles() {
  thread_local std::map<int, std::unique_ptr<Handles>> of_device;
  int device = 0;
  cuda::check(cudaGetDevice(&device), "current device");
  std::unique_ptr<Handles>& found = of_device[device];
  if (!found) found = std::make_unique<Handles>();
  return *found;
}

}  // namespace

void LinearAlgebra::add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram) {
  // A workspace of this call's own makes results independent of what other streams do; the size is
  // what cuBLAS recommends for all architectures before Hopper, and small products need no more.
  constexpr size_t kWorkspaceBytes = size_t{4} << 20;
  const cublasHandle_t blas = handles().blas.get();
  if (!workspace_) workspace_ = context_.allocate(context_.owner, kWorkspaceBytes);
  check(cublasSetStream(blas, static_cast<cudaStream_t>(context_.stream)), "set the stream");
  check(cublasSetWorkspace(blas, workspace_, kWorkspaceBytes), "set the workspace");
  // No TF32 and no other format in place of float; atomics stay off, as they are by default, so that
  // the order of summation is fixed.
  check(cublasSetMathMode(blas, CUBLAS_PEDANTIC_MATH), "set the precision");
  // Columns come first for cuBLAS: rows [tokens, dim] are a matrix A of dim rows, and the Gram
  // matrix is A A^T.
  const float one = 1.0f;
  const int64_t row_stride = tokens * dim, gram_stride = int64_t{dim} * dim;
  check(cublasSgemmStridedBatched(blas, CUBLAS_OP_N, CUBLAS_OP_T, dim, dim,
                                  static_cast<int>(tokens), &one, rows, dim, row_stride, rows, dim,
                                  row_stride, &one, gram, dim, gram_stride, heads),
        "Gram matrices");
}

void LinearAlgebra::eigenvectors(float* matrices, float* values, int heads, int dim, int* info) {
  Handles& of = handles();
  const cusolverDnHandle_t solver = of.solver.get();
  check(cusolverDnSetStream(solver, static_cast<cudaStream_t>(context_.stream)), "set the stream");
  constexpr auto kVectors = CUSOLVER_EIG_MODE_VECTOR;
  constexpr auto kTriangle = CUBLAS_FILL_MODE_LOWER;  // both are stored; one is read
  size_t device_bytes = 0, host_bytes = 0;
  check(cusolverDnXsyevBatched_bufferSize(solver, of.params.get(), kVectors, kTriangle, dim,
                                          CUDA_R_32F, matrices, dim, CUDA_R_32F, values, CUDA_R_32F,
                                          &device_bytes, &host_bytes, heads),
        "workspace of the eigenvectors");
  void* workspace = context_.allocate(context_.owner, static_cast<int64_t>(device_bytes));
  host_workspace_.resize(host_bytes);
  // Eigenvectors come in columns, columns first: in memory, one a row.
  check(cusolverDnXsyevBatched(solver, of.params.get(), kVectors, kTriangle, dim, CUDA_R_32F,
                               matrices, dim, CUDA_R_32F, values, CUDA_R_32F, workspace,
                               device_bytes, host_workspace_.data(), host_bytes, info, heads),
        "eigenvectors");
}

}  // namespace svdq::cuda
