#!/usr/bin/env bash
# Runs the CUDA kernels as nvcc emits them, on a machine without a GPU: the GoogleTest binary of the kernels and a
# part of the Python tests on CUDA tensors, under a PTX emulator that stands in for the CUDA runtime and checks
# bounds, races, barriers and reads of unwritten memory.
# Usage: tools/run_ptx.sh [folder of the emulator's source]   (or PTXSIM_DIR; nothing to do without one)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=${1:-${PTXSIM_DIR:-}}
[ -n "$source" ] || { echo 'No PTX emulator: give its folder, or set PTXSIM_DIR' >&2; exit 2; }
jobs=${MAX_JOBS:-$(nproc)}
python=.venv/bin/python
export PTXSIM_MAXREPORTS=${PTXSIM_MAXREPORTS:-4}

# Its stand-ins for cuBLAS and cuSOLVER are written on these.
has_blas() { printf '#include <cblas.h>\n#include <lapacke.h>\n' | g++ -fsyntax-only -x c++ - 2>/dev/null; }
if ! has_blas; then
  [ "$(id -u)" = 0 ] || { echo 'Please install libopenblas-dev and liblapacke-dev' >&2; exit 1; }
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    libopenblas-dev liblapacke-dev >/dev/null
fi

# Built in a copy, since the folder may be read-only.
emulator=build/ptx-emulator
mkdir -p "$emulator"
cp -ru --no-preserve=mode "$source"/. "$emulator"/
chmod +x "$emulator/ptxsim"
make -C "$emulator" -j "$jobs" > build/ptx-emulator.log 2>&1 || { tail -n 40 build/ptx-emulator.log; exit 1; }
ptxsim=$PWD/$emulator/ptxsim

cmake -S . -B build/cuda -DSVDQ_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=80-virtual > build/cuda-configure.log
cmake --build build/cuda -j "$jobs" --target svdq_cuda_tests -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }

run_tests() {  # run_tests <gtest filter>
  PTXSIM_PRELOAD_ALL=1 "$ptxsim" build/cuda/svdq_cuda_tests --gtest_filter="$1" --gtest_brief=1
}
echo '== GoogleTest, PTX'
run_tests '*'
for seed in 1 2 3; do
  echo "== GoogleTest, PTX, warps shuffled by seed $seed"
  PTXSIM_SCHED=$seed run_tests '-*Tiles.EveryQueryLengthAndGroup*'
done

echo '== pytest, CUDA tensors, PTX'
"$ptxsim" "$python" -m pytest -m 'not libraries' -k cuda tests
