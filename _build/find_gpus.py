"""Choose the CUDA architectures to compile for. As a script: print ``architectures;reason`` for CMake.

An installation from source needs kernels for the GPUs of its machine only, which takes a quarter of the time. Wheels and CI ask for all of them with ``QPEFT_CUDA_ARCHS=all``.
"""

import os
import re
import shutil
import subprocess
import sys

ALL = "80-real 90a-real 100-real 120"  # Ampere to Blackwell; the PTX of the last one serves later GPUs
OLDEST = (8, 0)  # the kernels copy with cp.async


def choose(wish: str, nvcc: str | None = None) -> tuple[str, str]:
    """Return the architectures in CMake's names, separated by blanks, and the reason for them.

    wish: the value of QPEFT_CUDA_ARCHS: ``native`` (as when it is empty), ``all``, or architectures.
    nvcc: the compiler, which may be older than the GPU.
    """
    wish = " ".join(re.split(r"[,; ]+", wish.strip()))
    if wish == "all":
        return ALL, "QPEFT_CUDA_ARCHS=all"
    if wish not in ("", "native"):
        return wish, "QPEFT_CUDA_ARCHS names them"
    found, why_none = visible_gpus()
    names = {architecture(capability, nvcc_codes(nvcc)) for capability in found if capability >= OLDEST}
    if names and None not in names:
        return " ".join(sorted(names)), "for the GPUs of this machine (QPEFT_CUDA_ARCHS=all: for every GPU)"
    if found:
        seen = ", ".join("{}.{}".format(*capability) for capability in sorted(set(found)))
        why_none = f"the GPUs of this machine ({seen}) are older than 8.0 or newer than nvcc"
    return ALL, f"for every GPU, since {why_none}"


def architecture(capability: tuple[int, int], codes: set[int]) -> str | None:
    """Return CMake's name of a GPU, or that of the nearest older one of its generation that nvcc knows, or None."""
    major, minor = capability
    known = [number for number in codes if number // 10 == major and number % 10 <= minor]
    if codes and not known:
        return None
    number = max(known) if codes else 10 * major + minor
    return f"{number}{'a' if number == 90 else ''}-real"  # Hopper has instructions of its own


def visible_gpus() -> tuple[list[tuple[int, int]], str]:
    """Return the compute capabilities of the GPUs that nvidia-smi shows, or none and why."""
    ran, why = run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = [(int(a), int(b)) for a, b in re.findall(r"^\s*(\d+)\.(\d+)\s*$", ran, re.M)]
    return found, "" if found else why or "nvidia-smi shows no GPU"


def nvcc_codes(nvcc: str | None) -> set[int]:
    """Return the GPUs that this nvcc compiles for, ``{80, 86, ...}``; empty if it does not say."""
    return {int(number) for number in re.findall(r"^sm_(\d+)$", run(nvcc or "nvcc", "--list-gpu-code")[0], re.M)}


def run(name: str, *arguments: str) -> tuple[str, str]:
    """Run a command; return what it prints, or "" and why it did not run."""
    command = shutil.which(name)
    if command is None:
        return "", f"{name} was not found"
    try:
        return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout, ""
    except (OSError, subprocess.SubprocessError) as error:
        return "", f"{name} cannot be used here ({type(error).__name__})"


if __name__ == "__main__":
    print(*choose(os.environ.get("QPEFT_CUDA_ARCHS", ""), *sys.argv[1:]), sep=";", end="")
