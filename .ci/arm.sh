#!/usr/bin/env bash
# Build the operators for AArch64 and run their tests there, emulated, so that no such machine is needed: make arm.
# Debian packages: g++-aarch64-linux-gnu qemu-user-static mmdebstrap. An hour on one core, 2 GB in build/arm.
# torch 2.10, the oldest that is supported, is the one that PyPI has for AArch64 without CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
for tool in aarch64-linux-gnu-g++ qemu-aarch64-static mmdebstrap; do
  command -v $tool >/dev/null || { echo "$tool was not found: apt-get install g++-aarch64-linux-gnu qemu-user-static mmdebstrap"; exit 2; }
done
arm=build/arm python=.venv/bin/python
mkdir -p "$arm"

if [ ! -e "$arm/root.done" ]; then # a Debian of that architecture, unpacked but not set up
  rm -rf "$arm/root"
  mmdebstrap --architectures=arm64 --variant=extract --include=python3,libgomp1,libstdc++6,ca-certificates bookworm "$arm/root"
  touch "$arm/root.done"
fi
if [ ! -e "$arm/site.done" ]; then
  rm -rf "$arm/site"
  wheels=(--quiet --only-binary=:all: --python-version 311 --implementation cp --platform any)
  for glibc in 2_17 2_28; do wheels+=(--platform "manylinux_${glibc}_aarch64"); done
  $python -m pip install "${wheels[@]}" --target "$arm/site" --no-deps torch==2.10.0
  $python -m pip install "${wheels[@]}" --target "$arm/site" \
    transformers sympy networkx jinja2 fsspec typer rich pyyaml pytest pytest-xdist hypothesis
  touch "$arm/site.done"
fi

# the tests import the package beside them: a copy, with the libraries of that architecture
rm -rf "$arm/tree" && mkdir -p "$arm/tree"
cp -r qpeft_ext python_tests pyproject.toml csrc "$arm/tree"
rm -f "$arm"/tree/qpeft_ext/*.so
QPEFT_TORCH_DIR="$PWD/$arm/site/torch" cmake -S . -B "$arm/build" -G Ninja \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DPython_EXECUTABLE="$PWD/$python" \
  -DPython_INCLUDE_DIR="$($python -c 'import sysconfig; print(sysconfig.get_path("include"))')"
cmake --build "$arm/build"
cmake --install "$arm/build" --prefix "$arm/tree/qpeft_ext"

root="$PWD/$arm/root"
export PYTHONPATH="$PWD/$arm/tree:$PWD/$arm/site" OMP_NUM_THREADS=1
cd "$arm/tree"
# left out: what starts another process, which an emulated one cannot, and large products
exec qemu-aarch64-static -L "$root" "$root/usr/bin/python3.11" -m pytest -q -p no:cacheprovider \
  -k 'not without_wide_vectors_too and not limits_onednn and not mapped_anew' \
  "${@:-python_tests/ops}"
