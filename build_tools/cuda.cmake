# nvcc is driven here and nowhere else: the toolkit, the architectures, the flags, and the library svdq_cuda, which
# the tests and the extension link.
#
# SVDQ_CUDA_ARCHS, a cache variable or one of the environment, names the architectures as CMake writes them
# (90;120, 80-virtual for PTX alone), or is `all` or `native`. SVDQ_CUDA_PACKAGES is the folder of pip's packages of CUDA
# (site-packages/nvidia/cu13), by default that of .venv.
set(SVDQ_ALL_ARCHS 80 86 89 90 100 120 80-virtual)
# The kernels use instructions of sm_80 alone, so one PTX text serves every architecture; a front end for each would take twice
# the time, and emulators of PTX run the text that GPUs do.
set(SVDQ_PTX 80)

if(NOT SVDQ_CUDA_PACKAGES)
  file(GLOB SVDQ_CUDA_PACKAGES ${PROJECT_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu[0-9]*)
endif()

# --- Find the compiler: CMAKE_CUDA_COMPILER or CUDACXX, else that of pip's packages in .venv, else on the PATH. ---
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  if(EXISTS "${SVDQ_CUDA_PACKAGES}/bin/nvcc")
    set(CMAKE_CUDA_COMPILER ${SVDQ_CUDA_PACKAGES}/bin/nvcc)
  else()
    find_program(CMAKE_CUDA_COMPILER nvcc PATHS /usr/local/cuda/bin REQUIRED)
  endif()
elseif(NOT DEFINED CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER $ENV{CUDACXX})
endif()

# --- Choose the architectures. ---
if(NOT SVDQ_CUDA_ARCHS)
  if(DEFINED ENV{SVDQ_CUDA_ARCHS})
    set(SVDQ_CUDA_ARCHS "$ENV{SVDQ_CUDA_ARCHS}")
  elseif(CMAKE_CUDA_ARCHITECTURES)
    set(SVDQ_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
  else()
    set(SVDQ_CUDA_ARCHS all)
  endif()
endif()
string(REPLACE "," ";" archs "${SVDQ_CUDA_ARCHS}")
if(archs STREQUAL "all")
  set(archs ${SVDQ_ALL_ARCHS})
elseif(archs STREQUAL "native")
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE archs OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  string(REPLACE "." "" archs "${archs}")
  string(REGEX REPLACE "[ \r\n]+" ";" archs "${archs}")
  if(NOT archs MATCHES "^[0-9;]+$")
    message(FATAL_ERROR "SVDQ_CUDA_ARCHS=native, but nvidia-smi reports no GPU")
  endif()
endif()
set(codes)
set(SVDQ_REAL_ARCHS)
foreach(arch ${archs})
  if(NOT arch MATCHES "^([0-9]+)(-real|-virtual)?$")
    message(FATAL_ERROR "SVDQ_CUDA_ARCHS: '${arch}' is not like 90, 90-real or 80-virtual")
  elseif(CMAKE_MATCH_2 STREQUAL "-virtual")
    list(APPEND codes compute_${SVDQ_PTX})
  else()
    list(APPEND codes sm_${CMAKE_MATCH_1})
    list(APPEND SVDQ_REAL_ARCHS ${CMAKE_MATCH_1})
  endif()
endforeach()
list(REMOVE_DUPLICATES codes)
list(REMOVE_DUPLICATES SVDQ_REAL_ARCHS)
string(REPLACE ";" "," codes "${codes}")
set(code_option "-gencode=arch=compute_${SVDQ_PTX},code=[${codes}]")
# Tests take PTX, which every GPU translates, unless the architecture is the machine's own.
set(SVDQ_CUDA_TEST_CODE "-gencode=arch=compute_${SVDQ_PTX},code=[compute_${SVDQ_PTX}]")
if(SVDQ_CUDA_ARCHS STREQUAL "native")
  set(SVDQ_CUDA_TEST_CODE ${code_option})
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # the options above say it

# --- Enable the language. ---
# The runtime is linked below, by its file: pip's package has no name without a version.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
# NVCC_APPEND_FLAGS="-cudart shared" reaches CMake's first trial of the compiler, which then needs that name.
cmake_path(GET CMAKE_CUDA_COMPILER PARENT_PATH cuda_root)
cmake_path(GET cuda_root PARENT_PATH cuda_root)
file(GLOB pip_cudart ${cuda_root}/lib/libcudart.so.[0-9]*)
if(pip_cudart)
  file(MAKE_DIRECTORY ${PROJECT_BINARY_DIR}/cuda-names)
  file(CREATE_LINK ${pip_cudart} ${PROJECT_BINARY_DIR}/cuda-names/libcudart.so SYMBOLIC)
  # And pip's nvcc of CUDA 13.0 searches lib64 for its static parts, where pip's packages have no folder.
  set(ENV{LIBRARY_PATH} "${PROJECT_BINARY_DIR}/cuda-names:${cuda_root}/lib:$ENV{LIBRARY_PATH}")
endif()
enable_language(CUDA)
# CMake before 3.26 knows no later standard than 17 for nvcc.
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_STANDARD 20)

# --- Find the runtime, cuBLAS and cuSOLVER. ---
add_library(svdq_cuda_toolkit INTERFACE)
set(cuda_libraries)

# Appends libraries to cuda_libraries by their files: pip's packages have those with versioned names alone, which
# find_package(CUDAToolkit) does not find.
macro(svdq_find_files folder)
  foreach(name ${ARGN})
    file(GLOB library ${folder}/lib${name}.so.[0-9]*)
    if(NOT library)
      message(FATAL_ERROR "${folder} has no lib${name}")
    endif()
    list(APPEND cuda_libraries ${library})
  endforeach()
endmacro()

if(pip_cudart)
  set(cuda_includes ${cuda_root}/include)
  target_include_directories(svdq_cuda_toolkit SYSTEM INTERFACE ${cuda_includes})
  svdq_find_files(${cuda_root}/lib cudart cublas cusolver)
else()
  find_package(CUDAToolkit REQUIRED)
  set(cuda_includes ${CUDAToolkit_INCLUDE_DIRS})
  set(cuda_libraries CUDA::cudart)
  if(TARGET CUDA::cublas AND TARGET CUDA::cusolver)
    list(APPEND cuda_libraries CUDA::cublas CUDA::cusolver)
  else()
    # A toolkit of compiler and runtime alone takes them from pip's packages. Only csrc/cuda/linalg.cpp sees those
    # headers, since nvcc refuses headers of another release.
    if(NOT EXISTS "${SVDQ_CUDA_PACKAGES}/include/cublas_v2.h")
      message(FATAL_ERROR "Neither the CUDA toolkit at ${cuda_root} nor pip's packages (SVDQ_CUDA_PACKAGES, "
        "'${SVDQ_CUDA_PACKAGES}') have cuBLAS and cuSOLVER")
    endif()
    set_source_files_properties(csrc/cuda/linalg.cpp PROPERTIES
      INCLUDE_DIRECTORIES ${SVDQ_CUDA_PACKAGES}/include)
    svdq_find_files(${SVDQ_CUDA_PACKAGES}/lib cublas cusolver)
  endif()
endif()
target_link_libraries(svdq_cuda_toolkit INTERFACE ${cuda_libraries})

# --- Compile csrc/cuda. ---
svdq_library(svdq_cuda csrc/cuda/*.cu csrc/cuda/*.cpp)
target_link_libraries(svdq_cuda PUBLIC svdq_core svdq_cuda_toolkit)
target_compile_options(svdq_cuda PRIVATE
  "$<$<COMPILE_LANGUAGE:CUDA>:${code_option};-lineinfo;--compress-mode=size;-Xptxas=-v;-Werror=all-warnings>")
# ptxas reports on each kernel; the launcher keeps the report as <object>.log.
set_target_properties(svdq_cuda PROPERTIES
  CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/build_tools/keep_report.sh)

# --- Write the choices down, for setup.py and to the tools that read the reports. ---
string(REPLACE ";" "\", \"" json_archs "${SVDQ_REAL_ARCHS}")
set(json_libraries)
foreach(library ${cuda_libraries})
  if(TARGET ${library})
    set(library $<TARGET_FILE:${library}>)
  endif()
  list(APPEND json_libraries ${library})
endforeach()
string(REPLACE ";" "\", \"" json_libraries "${json_libraries}")
string(REPLACE ";" "\", \"" json_includes "${cuda_includes}")
file(GENERATE OUTPUT ${PROJECT_BINARY_DIR}/cuda.json CONTENT "{
  \"compiler\": \"${CMAKE_CUDA_COMPILER}\",
  \"architectures\": [\"${json_archs}\"],
  \"includes\": [\"${json_includes}\"],
  \"libraries\": [\"${json_libraries}\"],
  \"objects\": [\"$<JOIN:$<TARGET_OBJECTS:svdq_cuda>,\", \">\"]
}
")
