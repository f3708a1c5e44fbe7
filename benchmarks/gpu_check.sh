#!/usr/bin/env bash
# Everything that needs a GPU, in one command of less than nine minutes: build, memory checks, tests, benchmarks.
# Needs torch (a CUDA build, >= 2.10), nvcc, cmake, ninja, pybind11, pytest and no network; installs nothing.
#
#   OUT=/tmp/results bash benchmarks/gpu_check.sh        results in $OUT (default gpu_results/): summary.txt, log.txt, *.json
#
# A step that fails does not stop the next one; what was not run is listed as such. Exit code 1 if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu_results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
deadline=$((SECONDS + ${BUDGET_S:-520}))
failed=0
: >"$OUT/summary.txt"
: >"$OUT/log.txt"

note() { echo "$*" | tee -a "$OUT/summary.txt" >>"$OUT/log.txt"; echo "$*"; }

# step NAME SECONDS COMMAND...: never longer than what is left of the budget; the last line of output goes to the summary
step() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) status last
  shift 2
  ((limit = limit < left ? limit : left))
  if ((limit < 10)); then note "NOT RUN  $name: the time budget is spent"; return; fi
  { echo; echo "==== $name: $*"; } >>"$OUT/log.txt"
  timeout -k 5 "$limit" "$@" >"$OUT/step.txt" 2>&1
  status=$?
  cat "$OUT/step.txt" >>"$OUT/log.txt"
  last=$(grep -v '^[[:space:]]*$' "$OUT/step.txt" | tail -n 1 | cut -c 1-200)
  case $status in
    0) note "ok       $name ($((SECONDS - begin)) s): $last" ;;
    124 | 137) note "TIMEOUT  $name after $limit s: $last"; failed=1 ;;
    *) note "FAILED   $name (exit $status, $((SECONDS - begin)) s): $last"; failed=1; tail -n 25 "$OUT/step.txt" ;;
  esac
  return $status
}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
step "GPU" 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
step "torch" 60 "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'

build() {
  QPEFT_CUDA=1 cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" &&
    cmake --build build/gpu && cmake --install build/gpu --prefix qpeft_ext
}
export -f build
export PYTHON
step "build" 150 bash -c build || { note "NOT RUN  everything else: the build failed"; rm -f "$OUT/step.txt"; exit 1; }
step "kernels live" 60 "$PYTHON" -c '
from qpeft_ext import _library
live = _library.kernels_live()
print(*(f"{device}: {why}" for device, (_, why) in live.items()), sep="; ")
assert all(ok for ok, _ in live.values())'

kernel_tests="python_tests/ops/test_cuda_*.py"
if command -v compute-sanitizer >/dev/null; then
  # without torch's caching allocator every tensor is an allocation of its own, so that reading past one is seen
  for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 \
      "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda $kernel_tests
  done
else
  note "NOT RUN  compute-sanitizer: it is not on PATH"
fi
step "tests on the GPU" 120 "$PYTHON" -m pytest -q -p no:cacheprovider -m cuda python_tests --durations=5
step "all tests" 200 "$PYTHON" -m pytest -q -p no:cacheprovider -m "not cuda" python_tests --durations=5

mkdir -p benchmarks/results
touch "$OUT/begin"
for op in similarity_topk clue_attention token_log_likelihood; do
  if [[ -f benchmarks/bench_$op.py ]]; then
    step "bench $op" 90 "$PYTHON" benchmarks/bench_$op.py --device cuda
  else
    note "NOT RUN  bench $op: benchmarks/bench_$op.py does not exist"
  fi
done
# at most three files with the three above: what this run measured
find benchmarks/results -maxdepth 1 -name '*.json' -newer "$OUT/begin" | sort | head -n 5 | xargs -r cp -t "$OUT"
rm -f "$OUT/step.txt" "$OUT/begin"
echo
cat "$OUT/summary.txt"
exit $failed
