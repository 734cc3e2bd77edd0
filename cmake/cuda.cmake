# Enables CUDA and defines svdq_cuda from csrc/cuda. The compiler is CMAKE_CUDA_COMPILER or CUDACXX, else that of
# pip's packages in .venv, else the one on the PATH.
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  file(GLOB pip_nvcc ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc)
  if(pip_nvcc)
    list(GET pip_nvcc 0 CMAKE_CUDA_COMPILER)
  endif()
endif()
# PTX of sm_80 runs on every later device, which translates it at the first run; for one that is here,
# -DCMAKE_CUDA_ARCHITECTURES=native spares that.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-virtual)
endif()
# The runtime is linked below, by its file: pip's package has no name without a version.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
enable_language(CUDA)
# CMake before 3.26 knows no later standard than 17 for nvcc.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)

# A toolkit of pip's packages has bin, include and lib in one folder and versioned libraries, which
# find_package(CUDAToolkit) does not find.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH cuda_root)
cmake_path(GET cuda_root PARENT_PATH cuda_root)
add_library(svdq_cuda_toolkit INTERFACE)
file(GLOB pip_cudart ${cuda_root}/lib/libcudart.so.[0-9]*)
if(pip_cudart)
  target_include_directories(svdq_cuda_toolkit SYSTEM INTERFACE ${cuda_root}/include)
  foreach(name cudart cublas cusolver)
    file(GLOB library ${cuda_root}/lib/lib${name}.so.[0-9]*)
    if(NOT library)
      message(FATAL_ERROR "${cuda_root}/lib has no lib${name}")
    endif()
    target_link_libraries(svdq_cuda_toolkit INTERFACE ${library})
  endforeach()
else()
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(svdq_cuda_toolkit INTERFACE CUDA::cudart CUDA::cublas CUDA::cusolver)
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
add_library(svdq_cuda STATIC ${cuda_sources})
target_link_libraries(svdq_cuda PUBLIC svdq_core svdq_cuda_toolkit)
