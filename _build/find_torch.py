"""Find the torch to build against, without importing it. As a script: print ``folder;version;cuda`` for CMake."""

import importlib.util
import os
import re
import site
import sysconfig
from pathlib import Path

OLDEST = (2, 10)  # the library is built for the stable ABI of this release, and runs on every later one


def find_torch() -> Path | None:
    """Return the folder of the torch package, or None.

    pip builds in an isolated environment where ``import torch`` fails although the environment that is being installed
    into has it. ``sysconfig`` and ``site`` still name the folders of that environment, so torch is looked up there.
    """
    if named := os.environ.get("QPEFT_TORCH_DIR"):
        folder = Path(named).expanduser().resolve()
        if not is_torch(folder):
            raise SystemExit(
                "QPEFT_TORCH_DIR must name the folder of the torch package (with version.py and include/ in it), "
                f"got {folder}"
            )
        return folder
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    roots = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    for environment in active_environments():
        roots.append(sysconfig.get_path("platlib", vars={"base": environment, "platbase": environment}))
    places += [os.path.join(root, "torch") for root in roots]
    return next((Path(place) for place in places if is_torch(Path(place))), None)


def active_environments() -> list[str]:
    """Return the virtual environments on PATH: `python -m build` works in a new one, after which PATH names the caller's."""
    folders = [os.path.dirname(entry) for entry in os.environ.get("PATH", "").split(os.pathsep)]
    found = [folder for folder in folders if os.path.isfile(os.path.join(folder, "pyvenv.cfg"))]
    return found + [folder for folder in [os.environ.get("VIRTUAL_ENV")] if folder]


def is_torch(folder: Path) -> bool:
    return (folder / "version.py").is_file() and (folder / "include" / "torch" / "csrc" / "stable").is_dir()


def read_version(folder: Path) -> tuple[str, str]:
    """``("2.13.0+cu130", "13.0")``; the second is empty for a CPU build and ``rocm`` for a HIP build."""
    text = (folder / "version.py").read_text()
    version = re.search(r"^__version__ = ['\"](.+?)['\"]", text, re.M)[1]
    cuda = re.search(r"^cuda\b.*= ['\"](.+?)['\"]", text, re.M)
    hip = re.search(r"^hip\b.*= ['\"](.+?)['\"]", text, re.M)
    return version, "rocm" if hip else cuda[1] if cuda else ""


def main() -> None:
    folder = find_torch()
    if folder is None:
        raise SystemExit(
            "No torch >= 2.10 was found to build against. Run `pip install torch` first, or set QPEFT_TORCH_DIR to the "
            "folder of an installed torch package."
        )
    version, cuda = read_version(folder)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        raise SystemExit(f"torch must be 2.10 or newer, found {version} in {folder}. Run `pip install -U torch`.")
    print(folder.as_posix(), version, cuda, sep=";", end="")


if __name__ == "__main__":
    main()
