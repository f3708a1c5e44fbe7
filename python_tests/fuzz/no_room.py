"""Requests to a running `qpeft serve` for which there is no memory, beside others for which there is.

    python python_tests/fuzz/no_room.py --count 40

The LM is random and has wide layers: one pass over a long document takes a hundred megabytes, one over a short document
almost nothing. While the server's memory is limited, the long one must get 503, and all others 503 or the right
scores; afterwards all are answered, and `/ready` is green. ``make fuzz-serve`` runs this, too.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from fuzz.serve_faults import ASKED, DEMO, Server, limited, memory, same, scores_in, started
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import qpeft_ext as qpeft

TOKENS = 900  # of the longest document that the server reads
WIDTH = 24576  # of the feed-forward layers: 88 MB in float32 for such a document, in all but the last layer
# Short documents need some. With none at all CPython 3.11 and the tokenizer end the process, and sockets are closed.
ROOM = 40 << 20
# of glibc: what is freed goes back to the system and no thread has a reserve; else there is memory beyond the limit
_BYTES = str(256 << 10)
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": _BYTES, "MALLOC_TRIM_THRESHOLD_": _BYTES, "MALLOC_ARENA_MAX": "1"}


def make_wide_model(folder: Path) -> None:
    """Write an LM with wide layers and an adapter, as `started` expects them."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(DEMO / "base_lm", num_hidden_layers=2, intermediate_size=WIDTH)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base_lm")
    for part in (lm, tokenizer):
        part.save_pretrained(folder / "base_lm")
    qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tokenizer).save_pretrained(folder / "adapter")


def no_room(server: Server, process: int, count: int) -> Counter[int]:
    """Ask a server for what it has no memory for. Returns: how often each status came for short documents meanwhile.

    Args:
        server: that `started` with a wide model, `TOKENS` and `GIVES_BACK`.
        process: its number.
        count: of long documents.
    """
    expected, statuses, short = server.scores(), Counter[int](), json.dumps(ASKED).encode()
    for i in range(count):
        asked = {"query": "sort", "documents": ["a list", f"item_{i} " * TOKENS], "raw_scores": True}
        long = json.dumps(asked).encode()
        bodies = [short, long, short, long, short]
        with limited(process, resource.RLIMIT_DATA, memory(process, "VmData") + ROOM), ThreadPoolExecutor(5) as pool:
            answers = list(pool.map(server.post, bodies))
            ready = server.ready()
        assert ready in (200, 503), f"/ready has status {ready}"
        for body, (status, answer) in zip(bodies, answers, strict=True):
            assert status in ((503,) if body is long else (200, 503)), (status, answer[:300])
            assert status == 503 or same(scores_in(answer), expected), "wrong scores in the lack of memory"
            statuses[status] += body is short
        assert same(server.scores(), expected), "wrong scores after a lack of memory"
        assert server.ready() == 200, "not ready although a pass succeeded"
    assert len(server.scores(asked)) == 2  # for which there is room now
    return statuses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="rounds of two long documents")
    given = parser.parse_args()
    if not given.count:
        print("no room for long documents: left out")
        return 0
    with tempfile.TemporaryDirectory() as name:
        make_wide_model(Path(name))
        with started(Path(name), 60.0, Path(name), TOKENS, GIVES_BACK) as (server, process):
            found = no_room(server, process.pid, given.count)
            print(f"no room for long documents; statuses of short ones meanwhile: {dict(found)}")
            return process.poll() or 0


if __name__ == "__main__":
    sys.exit(main())
