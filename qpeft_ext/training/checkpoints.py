"""Checkpoint folders that can be told whole from cut short.

``complete.json``, the names, sizes and checksums of all other files, is written last and appears at once; a folder
without it, or with a file missing or of another size, was cut short (by a kill in the middle of a save, or of a
deletion).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path

from ..utils.files import write_text
from ..utils.small_files import read_json

MANIFEST = "complete.json"
_MAX_SUMMED = 256 << 20  # bytes of a file that gets a checksum; the LM of train_lm would take longer than its save


def mark_complete(folder: str | Path) -> None:
    """Flush every file to the disk, then write the manifest."""
    folder = Path(folder)
    sizes, sums = {}, {}
    for path in _files(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        sizes[name] = path.stat().st_size
        if sizes[name] <= _MAX_SUMMED:
            sums[name] = zlib.crc32(path.read_bytes())
    write_text(folder / MANIFEST, json.dumps({"files": sizes, "sums": sums}, indent=2), follow=False)


def why_incomplete(folder: str | Path, read: bool = False) -> str:
    """Say what is wrong with a checkpoint folder; "" if it is whole. ``read``: compare checksums too."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        manifest = read_json(folder / MANIFEST)
        sizes, sums = manifest["files"].items(), dict(manifest.get("sums", {}))
    except FileNotFoundError:
        return f"it has no {MANIFEST}: the save was cut short"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is not readable"
    for name, size in sizes:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
        if read and name in sums and zlib.crc32(path.read_bytes()) != sums[name]:
            return f"{name} is damaged: wrong checksum"
    return ""


def last_complete(output_dir: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the whole checkpoint with the most steps, and why each later one is not whole."""
    skipped: dict[Path, str] = {}
    for folder in reversed(_checkpoints(Path(output_dir))):
        reason = why_incomplete(folder, read=True)
        if not reason:
            return folder, skipped
        skipped[folder] = reason
    return None, skipped


def rotate(output_dir: str | Path, limit: int | None, keep: set[Path]) -> None:
    """Delete checkpoints that are not whole, then the oldest beyond ``limit``; never those in ``keep``.

    Runs after the newest one is whole: at any moment there is one to resume from.
    """
    if not limit or limit < 1:
        return
    keep = {path.resolve() for path in keep}
    whole = []
    for folder in _checkpoints(Path(output_dir)):
        if folder.resolve() in keep or not why_incomplete(folder):
            whole.append(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    # by age, not by steps: the folder may hold checkpoints of an earlier run that had got further
    whole.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns if (folder / MANIFEST).exists() else 0)
    surplus = len(whole) - max(limit, len(keep))
    for folder in [folder for folder in whole if folder.resolve() not in keep][: max(0, surplus)]:
        shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, fewest steps first."""
    folders = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in folders if path.is_dir()), key=lambda path: int(path.name.rpartition("-")[2]))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
