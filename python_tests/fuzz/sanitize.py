"""The operators' tests and hostile calls under AddressSanitizer and UndefinedBehaviorSanitizer (gcc, Linux).

    python python_tests/fuzz/sanitize.py --count 10000 --seed 0

Builds into build/sanitize, copies the Python files of the package beside the library, and runs them with the runtime of
the sanitizers loaded first. A report of either ends its process; the exit code is then 1. Instructions that this
processor does not have (AMX, AVX512) are compiled but not run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package" / "qpeft_ext"
FLAGS = "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
TESTS = ["test_clue_attention.py", "test_projected_table.py", "test_similarity_topk.py", "test_token_log_likelihood.py",
         "test_bfloat16_attention.py", "test_bfloat16_products.py", "test_rms_norm.py", "test_gated_silu.py",
         "test_rotary.py", "test_int8_linear.py", "test_causal_attention.py", "test_joined_prefixes.py",
         "test_hostile_calls.py", "test_higher_derivatives.py"]  # fmt: skip
# torch.compile starts compilers, which would have the runtime too; the profiler counts what the sanitizers allocate;
# processes under another ONEDNN_MAX_CPU_ISA take a quarter of a minute each
NOT_HERE = "not compiles and not memory_is_bounded and not limits_kernels"


def build() -> None:
    tools = [shutil.which("cmake"), shutil.which("ninja"), shutil.which("g++")]
    if not all(tools):
        sys.exit("sanitize: needs cmake, ninja and g++ on PATH")
    environment = {**os.environ, "QPEFT_CUDA": "0", "CXX": "g++"}
    configure = [tools[0], "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
                 "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DCMAKE_CXX_FLAGS_RELWITHDEBINFO={FLAGS}"]  # fmt: skip
    subprocess.run(configure, check=True, env=environment, stdout=subprocess.DEVNULL)
    subprocess.run([tools[0], "--build", BUILD, "--target", "_C"], check=True, env=environment)
    shutil.rmtree(PACKAGE.parent, ignore_errors=True)
    shutil.copytree(ROOT / "qpeft_ext", PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "_C.so"))
    shutil.copy(BUILD / "_C.so", PACKAGE)


def runtime() -> str:
    """For LD_PRELOAD. The C++ library too: the sanitizer looks for its functions before torch brings it."""
    names = ["libasan.so", "libubsan.so", "libstdc++.so.6"]
    paths = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if not os.path.isabs(path)]:
        sys.exit(f"sanitize: g++ has no {', '.join(missing)}; install the sanitizers of its version")
    return ":".join(paths)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(PACKAGE.parent), str(ROOT / "python_tests")])
    return {**os.environ, "LD_PRELOAD": runtime(), "PYTHONPATH": path, "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:halt_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="hostile calls, a half of them of primitives")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    build()
    seed, fuzz = f"--seed={options.seed}", ROOT / "python_tests" / "fuzz"
    tests = [ROOT / "python_tests" / "ops" / name for name in TESTS]
    library = str(PACKAGE / "_C.so")
    loaded = f"import qpeft_ext.ops._library as x; x.load(); assert str(x.LIBRARY) == {library!r}, x.LIBRARY"
    commands = [
        ["-P", "-c", loaded],
        ["-P", fuzz / "primitives.py", f"--count={options.count // 2}", seed],
        ["-P", fuzz / "operators.py", f"--count={options.count // 6}", seed],  # of each of three operators
        ["-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NOT_HERE, *tests],
    ]
    failed = 0
    for command in commands:
        begin = time.monotonic()
        ended = subprocess.run([sys.executable, *command], env=environment(), cwd=BUILD).returncode
        failed += ended != 0
        words = " ".join(str(part) for part in command[1:3])
        print(f"sanitize: {words}: exit {ended}, {time.monotonic() - begin:.0f} s", flush=True)
    sys.exit(f"sanitize: {failed} of {len(commands)} failed" if failed else 0)


if __name__ == "__main__":
    main()
