"""`formats.Corpus` on a generated jsonl: time of the index, random lookups, growth of resident memory.

    python benchmarks/bench_corpus.py                 1,000,000 documents; fails if a limit is missed
    python benchmarks/bench_corpus.py --documents N

The baseline is what BEIR's own loader does: every document parsed into one dict. Each is measured in a process of its
own, from the first import on. ``ours_ms`` of ``corpus_lookup`` is for 100,000 documents in random order.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOOKUPS = 100_000
LIMITS = {"index_s": 40.0, "lookups_per_s": 20_000.0, "resident_bytes": 200e6}  # of a million documents
_PROGRAM = "import sys, bench_corpus; bench_corpus.child(*sys.argv[1:])"


def generate(path: Path, documents: int) -> None:
    """Write documents with 3 words of title and 60 of text, about 400 bytes each, their ids in random order."""
    source = random.Random(0)
    words = [f"w{i}" for i in range(5000)]
    ids = list(range(documents))
    source.shuffle(ids)
    with open(path, "w", encoding="utf-8") as file:
        for i in ids:
            title, text = (" ".join(source.choices(words, k=k)) for k in (3, 60))
            file.write(json.dumps({"_id": f"doc{i}", "title": title, "text": text}) + "\n")


def child(kind: str, path: str, documents: str) -> None:
    """Measure in this process and print wall times (ms), CPU times (s) and resident bytes."""
    from qpeft_ext import formats

    before = _resident()
    cpu, start = time.process_time(), time.perf_counter()
    corpus = formats.Corpus(path) if kind == "ours" else _dictionary(path)
    opened, open_cpu = time.perf_counter(), time.process_time() - cpu
    source = random.Random(1)
    wanted = [f"doc{source.randrange(int(documents))}" for _ in range(LOOKUPS)]
    cpu, begin = time.process_time(), time.perf_counter()
    for doc_id in wanted:
        assert corpus[doc_id]["id"] == doc_id
    end, lookup_cpu = time.perf_counter(), time.process_time() - cpu
    print(
        json.dumps(
            {
                "open_ms": (opened - start) * 1e3,
                "lookup_ms": (end - begin) * 1e3,
                "open_cpu_s": open_cpu,
                "lookup_cpu_s": lookup_cpu,
                "resident_bytes": _resident() - before,
            }
        )
    )


def measure(documents: int, repeats: int) -> tuple[list[dict], dict[str, float]]:
    """Measure ours and the baseline in turns; return rows of medians, and the numbers that `LIMITS` names."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        generate(path, documents)
        seen: dict[str, list[dict]] = {"built": [], "ours": [], "dictionary": []}
        for _ in range(repeats):
            cache = Path(folder) / "cache"
            for name in seen:
                if name == "built":
                    for file in cache.glob("*"):
                        file.unlink()
                kind = "dictionary" if name == "dictionary" else "ours"
                done = subprocess.run(
                    [sys.executable, "-c", _PROGRAM, kind, str(path), str(documents)],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=Path(__file__).parent,
                    env=os.environ | {"QPEFT_CACHE": str(cache)},
                )
                seen[name].append(json.loads(done.stdout))

    def median(name: str, key: str) -> float:
        return statistics.median([result[key] for result in seen[name]])

    rows = []
    for work, name, key in (
        ("corpus_index", "built", "open_ms"),
        ("corpus_open", "ours", "open_ms"),
        ("corpus_lookup", "ours", "lookup_ms"),
    ):
        ours, theirs = median(name, key), median("dictionary", key)
        rows.append(
            {
                "work": f"{work}/{documents}",
                "ours_ms": ours,
                "baselines_ms": {"dictionary": theirs},
                "ratio": {"dictionary": theirs / ours},
                "ours_peak_bytes": median(name, "resident_bytes"),
                "baselines_peak_bytes": {"dictionary": median("dictionary", "resident_bytes")},
                "bound_share": None,
                "max_error": None,
            }
        )
    print(
        f"CPU time beside the wall time: index {median('built', 'open_cpu_s'):.1f} s, "
        f"{LOOKUPS / median('ours', 'lookup_cpu_s'):,.0f} lookups a second"
    )
    measured = {
        "index_s": rows[0]["ours_ms"] / 1e3,
        "lookups_per_s": LOOKUPS / rows[2]["ours_ms"] * 1e3,
        "resident_bytes": max(row["ours_peak_bytes"] for row in rows),
    }
    return rows, measured


def missed(measured: dict[str, float]) -> list[str]:
    return [
        f"{name}: {measured[name]:,.0f}, the limit is {limit:,.0f}"
        for name, limit in LIMITS.items()
        if (measured[name] < limit if name == "lookups_per_s" else measured[name] > limit)
    ]


def _dictionary(path: str) -> dict[str, dict]:
    with open(path, encoding="utf-8") as file:
        records = (json.loads(line) for line in file)
        return {
            record["_id"]: {"id": record["_id"], "title": record["title"], "text": record["text"]} for record in records
        }


def _resident() -> int:
    """Return the largest resident set so far, in bytes; that of `getrusage` would include the parent process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_tiny():
    rows, measured = measure(2000, repeats=1)
    assert [row["work"] for row in rows] == ["corpus_index/2000", "corpus_open/2000", "corpus_lookup/2000"]
    assert not missed(measured)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the offset index of a corpus against a dict of all documents.")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows, measured = measure(arguments.documents, arguments.repeats)
    for row in rows:
        print(
            f"{row['work']}: ours {row['ours_ms']:,.0f} ms, {row['ours_peak_bytes'] / 1e6:,.0f} MB; dictionary "
            f"{row['baselines_ms']['dictionary']:,.0f} ms, {row['baselines_peak_bytes']['dictionary'] / 1e6:,.0f} MB"
        )
    print(f"{measured['lookups_per_s']:,.0f} lookups a second")
    import torch  # not at the top: the measured processes must not load it
    from result_file import RESULTS, machine, write

    device = torch.device("cpu")
    print("wrote", write(RESULTS / f"{machine(device)}_corpus.json", device, rows))
    for complaint in (failures := missed(measured)):
        print("MISSED", complaint)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
