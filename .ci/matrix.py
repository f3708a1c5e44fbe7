"""Try a wheel with several versions of Python, torch and transformers, each in a fresh environment without a compiler.

For each Python that is found, a wheel is taken from ``dist`` (`make wheel`); each pair of Python and torch gets an
environment outside the checkout, in which smoke.py runs with each transformers. Nothing but the environment's own `bin`
is on PATH. Prints a table, and exits with 1 where a cell failed.

    python .ci/matrix.py WHEEL                                                 everything; downloads gigabytes
    python .ci/matrix.py WHEEL --python 3.11 --torch 2.13.0 --transformers newest     one cell, as `make wheel` does
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10.0", "2.13.0", "newest")  # the oldest that the library runs on, that of development, the newest allowed
TRANSFORMERS = ("lowest", "newest")


def find_python(version: str) -> str | None:
    """Return an interpreter of this version, from PATH or pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]
    asks = f"import sys; sys.exit(sys.version_info[:2] != {tuple(map(int, version.split('.')))})"
    for candidate in filter(None, candidates):
        if subprocess.run([candidate, "-c", asks], capture_output=True).returncode == 0:
            return str(candidate)
    return None


def requirement(package: str, version: str) -> str:
    """Return the requirement for pip; ``lowest`` is the bound of pyproject.toml."""
    if version == "lowest":
        lowest = re.search(package + ">=([0-9.]+)", (HERE.parent / "pyproject.toml").read_text())[1]
        return f"{package}=={lowest}.*"
    return package if version == "newest" else f"{package}=={version}"


def try_cell(folder: Path, wheel: Path, version: str) -> str:
    """Return what smoke.py prints in the environment with this transformers, or the last line of an error."""
    python, path = folder / "bin" / "python", {"PATH": str(folder / "bin")}
    install = [python, "-m", "pip", "install", "-q", "--upgrade", requirement("transformers", version), wheel]
    smoke = [python, "-W", "ignore", "smoke.py"]
    for command, environment in ((install, os.environ | path), (smoke, path)):
        ran = subprocess.run(command, cwd=folder / "run", env=environment, capture_output=True, text=True)
        if ran.returncode:
            return "FAILED: " + (ran.stderr.strip() or "nothing was said").splitlines()[-1]
    return ran.stdout.strip().splitlines()[-1]


def try_torch(root: Path, interpreter: str, torch: str, wheel: Path, versions: list[str]) -> list[str]:
    folder = Path(tempfile.mkdtemp(dir=root))
    try:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        (folder / "run").mkdir()
        shutil.copy(HERE / "smoke.py", folder / "run")
        install = [folder / "bin" / "python", "-m", "pip", "install", "-q", requirement("torch", torch)]
        ran = subprocess.run(install, capture_output=True, text=True)
        if ran.returncode:
            return ["NOT TRIED: " + ran.stderr.strip().splitlines()[-1]] * len(versions)
        return [try_cell(folder, wheel, version) for version in versions]
    finally:
        shutil.rmtree(folder)  # several gigabytes where torch is a CUDA build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--torch", nargs="+", default=TORCHES)
    parser.add_argument("--transformers", nargs="+", default=TRANSFORMERS)
    asked = parser.parse_args()
    wheel, failed = asked.wheel.resolve(strict=True), False
    print("| Python | torch | transformers | outcome |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for version in asked.python:
            interpreter = find_python(version)
            if interpreter is None:
                print(f"| {version} | | | not installed |", flush=True)
                continue
            for torch in asked.torch:
                start = time.monotonic()
                outcomes = try_torch(Path(root), interpreter, torch, wheel, asked.transformers)
                for transformers, outcome in zip(asked.transformers, outcomes, strict=True):
                    print(f"| {version} | {torch} | {transformers} | {outcome[:300]} |", flush=True)
                    failed |= not outcome.startswith("ok")
                print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
