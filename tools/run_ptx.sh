#!/usr/bin/env bash
# Runs the CUDA kernels as nvcc emits them, on a machine without a GPU: the GoogleTest binary of the kernels and the
# Python tests on CUDA tensors, under a PTX emulator that stands in for the CUDA runtime and checks bounds, races,
# barriers and reads of unwritten memory. `make ci-ptx` builds the extension with CUDA first.
# Usage: tools/run_ptx.sh [folder of the emulator's source]   (or PTXSIM_DIR)
# PTX_SEEDS: the seeds of the warp orders that GoogleTest runs in, in addition to the natural order.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source=${1:-${PTXSIM_DIR:-}}
[ -n "$source" ] || { echo 'No PTX emulator: give its folder, or set PTXSIM_DIR' >&2; exit 2; }
jobs=${MAX_JOBS:-$(nproc)}
python=.venv/bin/python
read -r -a seeds <<< "${PTX_SEEDS-1}"
export PTXSIM_MAXREPORTS=${PTXSIM_MAXREPORTS:-4}

# Its stand-ins for cuBLAS and cuSOLVER call these.
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

# The same library svdq_cuda as the extension's; the tests are compiled to PTX.
cmake -S . -B build/cpp -DSVDQ_CUDA=ON > build/cuda-configure.log
cmake --build build/cpp -j "$jobs" --target svdq_cuda_tests -- --no-print-directory | { grep -Ev '^(\[|-- )' || true; }

run_tests() {  # run_tests <seed, 0 for the natural order>
  local filter='*'
  [ "$1" = 0 ] || { export PTXSIM_SCHED=$1; filter='-*Tiles.EveryQueryLengthAndGroup*'; }
  PTXSIM_PRELOAD_ALL=1 "$ptxsim" build/cpp/svdq_cuda_tests --gtest_filter="$filter" --gtest_brief=1 \
    > "build/ptx-$1.log" 2>&1
}
# One process runs one block after another, so as many run at once as there are cores.
failed=0
pids=()
wait_for_oldest() {
  wait "${pids[0]}" || failed=1
  pids=("${pids[@]:1}")
}
for seed in 0 "${seeds[@]}"; do
  [ "${#pids[@]}" -lt "$jobs" ] || wait_for_oldest
  run_tests "$seed" &
  pids+=($!)
done
while [ "${#pids[@]}" -gt 0 ]; do wait_for_oldest; done
for seed in 0 "${seeds[@]}"; do
  echo "== GoogleTest, PTX, warp order $seed"
  cat "build/ptx-$seed.log"
done
[ "$failed" = 0 ] || exit 1

echo '== pytest, CUDA tensors, PTX'
"$ptxsim" "$python" -m pytest -n "$jobs" -m 'not libraries' -k cuda tests
