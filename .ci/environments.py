"""Run a command with packages that development does not need, in environments of their own below build/environments.

Each environment is a layer over the one that this runs in: what is installed there is there, and only what is missing
is installed in addition. It is made once, and anew when the list of its packages changes.

    python .ci/environments.py plugins -- -m pytest python_tests/integrations
    python .ci/environments.py clients -- -m pytest python_tests/clients

A name is one of ``[dependency-groups]`` in pyproject.toml, or one of our extras.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(name: str) -> list[str]:
    """Return what pip shall install, for a group of dependencies or an extra; names of ours stand for its own list."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lists = table["project"]["optional-dependencies"] | table.get("dependency-groups", {})
    if name not in lists:
        sys.exit(f"pyproject.toml has no group or extra {name}; it has {', '.join(sorted(lists))}")
    found = []
    for requirement in lists[name]:
        if requirement.startswith("qpeft_ext["):
            found += [r for extra in requirement[10:-1].split(",") for r in requirements(extra.strip())]
        else:
            found.append(requirement)
    return found


def make(name: str) -> Path:
    """Make the environment, unless it is there with these packages, and return its Python."""
    folder, wanted = ROOT / "build" / "environments" / name, requirements(name)
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.is_file() and done.read_text().split("\n") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (own / "layer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted]
    if subprocess.run(pip).returncode:
        sys.exit(f"pip could not install {', '.join(wanted)}")
    done.write_text("\n".join(wanted))
    return python


def main() -> int:
    if len(sys.argv) < 4 or sys.argv[2] != "--":
        sys.exit(__doc__)
    python = make(sys.argv[1])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([python, *sys.argv[3:]], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
