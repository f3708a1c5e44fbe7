#!/usr/bin/env bash
# Everything that needs a GPU, in parts of less than nine minutes each.
# Needs torch (a CUDA build, >= 2.10), nvcc, cmake, ninja, pytest and no network. Wheels in a folder .whl (of
# liger-kernel and cut-cross-entropy, for instance) are unpacked for the run; nothing is installed.
#
#   OUT=/tmp/results bash benchmarks/gpu_check.sh check     build, machine code, tests on the GPU, all tests, compute-sanitizer
#   OUT=/tmp/results bash benchmarks/gpu_check.sh ops       build, the operators' benchmarks at Llama-2-7B's shape
#   OUT=/tmp/results bash benchmarks/gpu_check.sh models    build, the other models' shapes; the clue modules' share of a step
#   DRY=1 bash benchmarks/gpu_check.sh check|ops|models     the same on the CPU with tiny inputs: does the script work?
#
# In $OUT (default gpu_results/): summary.txt, log.txt, <gpu>_ops.json with its roofline as .png. Benchmarks add their rows to
# benchmarks/results/<gpu>_ops.json: on a fresh machine put an earlier part's file there first.
# A step that fails does not stop the next one; what was not run is listed as such. Exit code 1 if a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
part=${1:-}
case $part in check | ops | models) ;; *) sed -n '2,15p' "$0"; exit 2 ;; esac
DRY=${DRY:-}
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
  if ((limit < 10)); then note "NOT RUN  $name: the time budget is spent"; return 1; fi
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

finish() {
  rm -f "$OUT/step.txt"
  rm -rf "${site:-}"
  echo
  cat "$OUT/summary.txt"
  exit $failed
}

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHON
site=$(mktemp -d)
if compgen -G '.whl/*.whl' >/dev/null; then
  for wheel in .whl/*.whl; do step "wheel $(basename "$wheel")" 60 "$PYTHON" -m zipfile -e "$wheel" "$site"; done
  PYTHONPATH="$PYTHONPATH:$site"  # after what the machine has
fi

device=cuda
if [[ $DRY ]]; then
  device=cpu
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
  step "GPU" 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  step "torch" 60 "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(), torch.cuda.get_device_capability())'
fi

build() {
  local python
  python=$("$PYTHON" -c 'import sys; print(sys.executable)') || return 1
  if [[ $DRY ]]; then
    export QPEFT_CUDA=0
  else  # for this GPU alone; 9.0 has instructions of its own
    export QPEFT_CUDA=1 QPEFT_CUDA_ARCHS
    QPEFT_CUDA_ARCHS=$("$PYTHON" -c 'import torch; a = "%d%d" % torch.cuda.get_device_capability(); print(("90a" if a == "90" else a) + "-real")')
  fi
  cmake -S . -B "build/gpu$DRY" -G Ninja -DPython_EXECUTABLE="$python" && cmake --build "build/gpu$DRY" &&
    cmake --install "build/gpu$DRY" --prefix qpeft_ext
}
export DRY
export -f build
step "build" 240 bash -c build || { note "NOT RUN  everything else: the build failed"; finish; }
step "kernels live" 60 "$PYTHON" -c '
import os
from qpeft_ext.ops import _library
live = _library.kernels_live()
print(*(f"{device}: {why}" for device, (_, why) in live.items()), sep="; ")
assert all(ok for device, (ok, _) in live.items() if device == "cpu" or not os.environ["DRY"])'

pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
if [[ $part == check ]]; then
  kernel_tests=(python_tests/ops/test_cuda_*.py)
  gpu_tests=(python_tests)
  mark=(-m cuda)
  if [[ $DRY ]]; then
    gpu_tests=(python_tests/ops/test_cuda_token_log_likelihood.py)
    mark=(-m "not cuda")
  fi
  if command -v cuobjdump >/dev/null && [[ ! $DRY ]]; then
    step "machine code" 60 "$PYTHON" benchmarks/sass_check.py qpeft_ext/_C.so
  else
    note "NOT RUN  machine code: cuobjdump is not on PATH, or there are no CUDA kernels (DRY)"
  fi
  workers=()
  if [[ ! $DRY ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
  step "tests on the GPU" 150 "${pytest[@]}" "${workers[@]}" "${mark[@]}" "${gpu_tests[@]}" --durations=5
  if [[ $DRY ]]; then
    step "all tests" 90 "${pytest[@]}" --collect-only python_tests
  else
    step "all tests" 200 env OMP_NUM_THREADS=2 "${pytest[@]}" "${workers[@]}" -m "not cuda" python_tests --durations=5
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    note "NOT RUN  compute-sanitizer: it is not on PATH"
  elif ! timeout 60 compute-sanitizer "$PYTHON" -c 'import torch; torch.zeros(1, device="cuda") + 1' >>"$OUT/log.txt" 2>&1; then
    note "NOT RUN  compute-sanitizer: this host refuses it (log.txt)"
  else
    # without torch's caching allocator every tensor is an allocation of its own, so that reading past one is seen
    for tool in memcheck racecheck synccheck; do
      step "compute-sanitizer $tool" 110 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool $tool --error-exitcode 9 --print-limit 5 \
        "${pytest[@]}" "${mark[@]}" -k "not graph" "${kernel_tests[@]}"  # graphs need the caching allocator
    done
  fi
  finish
fi

# ---- benchmarks ------------------------------------------------------------------------------------------------------
results=benchmarks/results/$("$PYTHON" -c "
import sys, torch
sys.path.insert(0, 'benchmarks')
from result_file import machine
print(machine(torch.device('$device')))")_ops.json || { note "FAILED   the benchmarks' common part"; failed=1; finish; }
tiny=()
if [[ $DRY ]]; then
  results=$OUT/dry_ops.json
  rm -f "$results"
  tiny=(--work tiny --out "$results" --skip torch_compile)
fi
if [[ $part == ops && ! $DRY ]]; then # torch.compile's search takes longer than everything else
  for op in token_log_likelihood similarity_topk clue_attention; do
    step "bench $op, without torch_compile" 90 "$PYTHON" benchmarks/bench_$op.py --device $device --skip torch_compile
  done
fi
for op in token_log_likelihood similarity_topk clue_attention; do
  if [[ $part == ops ]]; then
    step "bench $op" 200 "$PYTHON" benchmarks/bench_$op.py --device $device "${tiny[@]}"
  else
    step "bench $op, other models" 130 "$PYTHON" benchmarks/bench_$op.py --device $device --others "${tiny[@]}"
  fi
done
if [[ $part == models ]]; then
  step "clue modules' share" 150 "$PYTHON" benchmarks/bench_clue_share.py --device $device ${DRY:+--out "$results"}
fi
if [[ -f $results ]]; then
  step "roofline" 60 "$PYTHON" benchmarks/roofline.py "$results"
  [[ $DRY ]] || cp "$results" "${results%.json}.png" "$OUT"
fi
finish
