"""The names of base LMs: a folder, a Hub id, a GGUF file, or a package that has one; each leads to files to load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from . import gguf
from .packages import PREFIX, gguf_of_package


@dataclass(frozen=True)
class Source:
    """Where the files of a base LM are.

    Args:
        name: as the user gave it, which stays the name of the LM.
        place: the folder, or the Hub id, that transformers loads.
        gguf_sha256: the SHA-256 of the GGUF file that the folder was made of; None for other LMs.
    """

    name: str
    place: str
    gguf_sha256: str | None = None


def locate(name_or_path: str | os.PathLike[str]) -> Source:
    """Return where an LM's files are. The first use of a GGUF file converts it, into the cache folder.

    Args:
        name_or_path: Hub id, folder, ``.gguf`` file, or ``package:NAME`` for the GGUF file in a Python package.
    Raises: OSError or ValueError for what is not there or damaged; ImportError for a package that reading GGUF needs.
    """
    name = str(name_or_path)
    if not name:
        raise ValueError("the name is empty; expected a folder, a Hub id, a .gguf file or package:NAME")
    if parts := gguf_parts(name):
        sha256 = gguf.sha256_of(parts)
        return Source(name, str(gguf.converted(parts, sha256)), sha256)
    return Source(name, _folder_or_hub_id(name))


def gguf_parts(name: str) -> list[Path]:
    """Return the GGUF file that a name stands for, as the files that make it up; none for a folder or a Hub id.

    Raises: OSError or ValueError for a file or package that is not there.
    """
    if name.startswith(PREFIX):
        return gguf_of_package(name.removeprefix(PREFIX))
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if not name.lower().endswith(".gguf") or path.is_dir():
        return []
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {name}")
    return [path]


def may_be_hub_id(name: str) -> bool:
    """Tell whether a name may be that of a repository on the Hub: nothing on this machine has it."""
    return not (name.startswith(PREFIX) or name.lower().endswith(".gguf") or _is_path(name) or Path(name).is_dir())


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _folder_or_hub_id(name: str) -> str:
    """Return the name. One that looks like a path must be a folder; otherwise the Hub would be asked for it."""
    if not Path(name).is_dir() and _is_path(name):
        raise FileNotFoundError(f"there is no folder {name}")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError("the folder has no config.json")
    if Path(name).is_dir():
        expect_plain_files(Path(name))
    return name


def expect_plain_files(folder: Path) -> None:
    """Check that a folder has only files and folders in it: reading a pipe would never end.

    Raises: ValueError naming something else.
    """
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path} is not a regular file; remove it")
