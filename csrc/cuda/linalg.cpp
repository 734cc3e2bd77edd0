#include "csrc/cuda/linalg.h"

#include <cublas_v2.h>
#include <cusolverDn.h>

#include <map>
#include <mutex>

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

}  // namespace

// Creating handles costs milliseconds and memory, so calls take turns with those of their device. A call has its own,
// since a handle remembers its stream. They are never destroyed: when the program ends, the libraries may be gone
// before whoever would destroy them.
struct LinearAlgebra::Handles {
  Handles() {
    check(cublasCreate(&blas), "create a handle");
    check(cusolverDnCreate(&solver), "create a handle");
    check(cusolverDnCreateParams(&params), "create parameters");
  }

  cublasHandle_t blas = nullptr;
  cusolverDnHandle_t solver = nullptr;
  cusolverDnParams_t params = nullptr;
};

struct LinearAlgebra::Pool {
  std::mutex mutex;
  std::map<int, std::vector<Handles*>> idle;  // by device

  static Pool& get() {
    static Pool& pool = *new Pool;
    return pool;
  }
};

LinearAlgebra::~LinearAlgebra() {
  if (!handles_) return;
  Pool& pool = Pool::get();
  const std::lock_guard lock(pool.mutex);
  pool.idle[device_].push_back(handles_);
}

LinearAlgebra::Handles& LinearAlgebra::handles() {
  if (handles_) return *handles_;
  cuda::check(cudaGetDevice(&device_), "current device");
  Pool& pool = Pool::get();
  {
    const std::lock_guard lock(pool.mutex);
    std::vector<Handles*>& idle = pool.idle[device_];
    if (!idle.empty()) {
      handles_ = idle.back();
      idle.pop_back();
    }
  }
  if (!handles_) handles_ = new Handles;
  return *handles_;
}

void LinearAlgebra::add_gram(const float* rows, int heads, int64_t tokens, int dim, float* gram) {
  // A workspace of this call's own makes results independent of what other streams do; the size is
  // what cuBLAS recommends for all architectures before Hopper, and small products need no more.
  constexpr size_t kWorkspaceBytes = size_t{4} << 20;
  const cublasHandle_t blas = handles().blas;
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
  const cusolverDnHandle_t solver = of.solver;
  check(cusolverDnSetStream(solver, static_cast<cudaStream_t>(context_.stream)), "set the stream");
  constexpr auto kVectors = CUSOLVER_EIG_MODE_VECTOR;
  constexpr auto kTriangle = CUBLAS_FILL_MODE_LOWER;  // both are stored; one is read
  size_t device_bytes = 0, host_bytes = 0;
  check(cusolverDnXsyevBatched_bufferSize(solver, of.params, kVectors, kTriangle, dim, CUDA_R_32F,
                                          matrices, dim, CUDA_R_32F, values, CUDA_R_32F,
                                          &device_bytes, &host_bytes, heads),
        "workspace of the eigenvectors");
  void* workspace = context_.allocate(context_.owner, static_cast<int64_t>(device_bytes));
  host_workspace_.resize(host_bytes);
  // Eigenvectors come in columns, columns first: in memory, one a row.
  check(cusolverDnXsyevBatched(solver, of.params, kVectors, kTriangle, dim, CUDA_R_32F, matrices,
                               dim, CUDA_R_32F, values, CUDA_R_32F, workspace, device_bytes,
                               host_workspace_.data(), host_bytes, info, heads),
        "eigenvectors");
}

}  // namespace svdq::cuda
