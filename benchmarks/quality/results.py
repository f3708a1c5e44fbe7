"""The results of a comparison without runs and adapters, in one file: for other machines, and to be kept.

    python benchmarks/quality/results.py pack build/quality/prose benchmarks/results/quality_prose.results.jsonl.xz
    python benchmarks/quality/results.py unpack benchmarks/results/quality_prose.results.jsonl.xz build/quality/prose

A line of the file is a result.json: settings, values per query, costs, versions, commit and machine. Unpacked, results
count as made for `qpeft compare` as long as LM, data and settings are the same; what is in the folder already stays.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path

from qpeft_ext.compare.cells import RESULT, SETTINGS
from qpeft_ext.compare.plan import file_name
from qpeft_ext.utils.files import write_text


def pack(folder: Path, file: Path) -> int:
    """Write all results of a comparison's folder to a file, sorted. Returns: how many."""
    paths = sorted(folder.glob(f"*/*/*/{RESULT}"))
    if not paths:
        raise SystemExit(f"{folder}: no results; expected COLLECTION/METHOD/seed-N/{RESULT}")
    lines = (json.dumps(json.loads(path.read_text(encoding="utf-8"))) for path in paths)
    partial = file.with_name(f"{file.name}.partial")
    with lzma.open(partial, "wb", preset=9) as packed:  # gzip does not see that results have the same queries
        for line in lines:
            packed.write(line.encode() + b"\n")
    partial.replace(file)
    return len(paths)


def unpack(file: Path, folder: Path) -> int:
    """Write the results of a file to a comparison's folder. Returns: how many were not there."""
    try:
        with lzma.open(file, "rt", encoding="utf-8") as lines:
            results = [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise SystemExit(f"{file}: expected results that this script has packed ({error})") from None
    fresh = 0
    for result in results:
        cell = folder / file_name(result["collection"]) / file_name(result["method"]) / f"seed-{result['seed']}"
        if (cell / RESULT).exists():
            continue
        cell.mkdir(parents=True, exist_ok=True)
        write_text(cell / SETTINGS, json.dumps(result["settings"], indent=1) + "\n")
        write_text(cell / RESULT, json.dumps(result, indent=1) + "\n")
        fresh += 1
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    count = {"pack": pack, "unpack": unpack}[options.what](options.source, options.target)
    print(f"{options.target}: {count} results")


if __name__ == "__main__":
    main()
