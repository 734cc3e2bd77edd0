#!/usr/bin/env bash
# Everything that a GPU can tell, in ten minutes: builds the CUDA kernels for the GPU at hand, runs GoogleTest, pytest on
# CUDA tensors, compute-sanitizer, the benchmarks and ncu, and writes report.json, report.md and logs.tar.gz into a
# folder. It fetches nothing and installs nothing; what needs a tool or a device that is missing is skipped, and said.
# Usage: tools/gpu.sh FOLDER
#   SVDQ_GTEST_DIR   GoogleTest's source (a folder with googletest/ or include/gtest), where it is not installed
#   CUDA_HOME        the toolkit, else nvcc on the PATH
#   SVDQ_CUDA_ARCHS  architectures to compile for; the GPU's own, or 90 where there is none
#   SVDQ_MINUTES     limit of the whole run (10)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# = 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
exec "${PYTHON:-python3}" tools/gpu_report.py "$1"
