# Enables CUDA and defines svdq_cuda from csrc/cuda. The compiler is CMAKE_CUDA_COMPILER or CUDACXX, else that of
# pip's packages in .venv, else the one on the PATH.
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  file(GLOB pip_nvcc ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc)
  if(pip_nvcc)
    list(GET pip_nvcc 0 CMAKE_CUDA_COMPILER)
  else()
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin REQUIRED)
  endif()
elseif(NOT DEFINED CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()
# PTX of sm_80 runs on every later device, which translates it at the first run; for one that is here,
# -DCMAKE_CUDA_ARCHITECTURES=native spares that.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
endif()
# The runtime is linked below, by its file: pip's package has no name without a version.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
# NVCC_APPEND_FLAGS="-cudart shared" reaches CMake's first trial of the compiler, which then needs that name.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH cuda_root)
cmake_path(GET cuda_root PARENT_PATH cuda_root)
file(GLOB pip_cudart ${cuda_root}/lib/libcudart.so.[0-9]*)
if(pip_cudart)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/cuda-names)
  file(CREATE_LINK ${pip_cudart} ${PROJECT_BINARY_DIR}/cuda-names/libcudart.so SYMBOLIC)
  # And pip's nvcc of CUDA 13.0 looks for its static parts in lib64, where pip's packages have no folder.
  set(ENV{LIBRARY_PATH} "${PROJECT_BINARY_DIR}/cuda-names:${cuda_root}/lib:$ENV{LIBRARY_PATH}")
endif()
enable_language(CUDA)
# CMake before 3.26 knows no later standard than 17 for nvcc.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)

# cuBLAS and cuSOLVER: from the toolkit; a small one (compiler and runtime alone) takes those of .venv, which only
# csrc/cuda/linalg.cpp sees, since nvcc refuses headers of another release.
file(GLOB pip_root ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu*)
add_library(svdq_cuda_toolkit INTERFACE)

# Links libraries by their files: pip's packages have those with versioned names alone, which
# find_package(CUDAToolkit) does not find.
function(svdq_link_files folder)
  foreach(name ${ARGN})
    file(GLOB library ${folder}/lib${name}.so.[0-9]*)
    if(NOT library)
      message(FATAL_ERROR "${folder} has no lib${name}")
    endif()
    target_link_libraries(svdq_cuda_toolkit INTERFACE ${library})
  endforeach()
endfunction()

set(SVDQ_HAS_CUBLAS TRUE)
if(pip_cudart)
  target_include_directories(svdq_cuda_toolkit SYSTEM INTERFACE ${cuda_root}/include)
  svdq_link_files(${cuda_root}/lib cudart cublas cusolver)
else()
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(svdq_cuda_toolkit INTERFACE CUDA::cudart)
  if(TARGET CUDA::cublas AND TARGET CUDA::cusolver)
    target_link_libraries(svdq_cuda_toolkit INTERFACE CUDA::cublas CUDA::cusolver)
  elseif(EXISTS "${pip_root}/include/cublas_v2.h")
    set_source_files_properties(csrc/cuda/linalg.cpp PROPERTIES INCLUDE_DIRECTORIES ${pip_root}/include)
    svdq_link_files(${pip_root}/lib cublas cusolver)
  else()
    set(SVDQ_HAS_CUBLAS FALSE)
    message(STATUS "No cuBLAS and cuSOLVER found: the basis stage and its tests are left out")
  endif()
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
if(NOT SVDQ_HAS_CUBLAS)
  list(FILTER cuda_sources EXCLUDE REGEX "/(covariance\\.cu|linalg\\.cpp)$")
endif()
add_library(svdq_cuda STATIC ${cuda_sources})
target_link_libraries(svdq_cuda PUBLIC svdq_core svdq_cuda_toolkit)
