"""The share of the clue modules in the time of a cold reranking step; the aim is at most 1 %.

    python benchmarks/bench_clue_share.py --device cuda     # Llama-2-7B's shape, random weights, bfloat16
    python benchmarks/bench_clue_share.py                   # a tiny model on the CPU; writes nothing

The step: one query with 100 documents of 200 tokens, no cache: prefixes, clues, suffixes, likelihoods.
"""

from __future__ import annotations

import sys

import torch
from random_llama import TINY, Shape, lm_config, make_batch, make_tokenizer
from result_file import new_parser, parse, save
from timing import default_dtype, median, peak_bytes, seconds
from transformers import LlamaForCausalLM

import qpeft_ext as qpeft

LLAMA_2_7B = Shape(layers=32, width=4096, inner=11008, heads=32, vocabulary=32000)


def make_model(shape: Shape, device: torch.device, clues: str) -> qpeft.QPeftModel:
    """Make a Llama whose weights are drawn on the device: 7 billion numbers take a minute on a CPU."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype(device))
    try:
        with torch.device(device):
            lm = LlamaForCausalLM(lm_config(shape, dtype=default_dtype(device)))
    finally:
        torch.set_default_dtype(before)
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues=clues), make_tokenizer(shape.vocabulary))


@torch.no_grad()
def measure(shape: Shape, documents: int, device: torch.device, clues: str, repeats: int) -> dict:
    """Return one row: ours_ms is the clue module's, baselines_ms the whole step's, with every wait for the GPU."""
    model, batch = make_model(shape, device, clues), make_batch(shape, 1, documents, seed=0)
    scores = model(batch).query_log_likelihood
    if not scores.isfinite().all():
        raise ValueError(f"{clues}: a score is not finite")
    whole = median(seconds(lambda: model(batch), device) for _ in range(repeats)) * 1e3
    clues_only = median(seconds(lambda: model.compute_clues(batch), device) for _ in range(4 * repeats)) * 1e3
    return {
        "work": f"clue_share/1x100/{clues}",
        "ours_ms": clues_only,
        "baselines_ms": {"whole_step": whole},
        "ratio": {"whole_step": whole / clues_only},
        "ours_peak_bytes": peak_bytes(lambda: model.compute_clues(batch), device),
        "baselines_peak_bytes": {"whole_step": peak_bytes(lambda: model(batch), device)},
        "bound_share": None,
        "max_error": None,
        "share": clues_only / whole,
        "shape": vars(shape) | {"documents": documents},
    }


def main() -> None:
    parser = new_parser("The clue modules' share of a cold reranking step.", "ops")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, which the CPU always takes")
    arguments = parse(parser)
    tiny = arguments.tiny or arguments.device.type == "cpu"
    for clues in ("attention", "top_k"):
        work = (TINY, 5) if tiny else (LLAMA_2_7B, 100)
        row = measure(*work, arguments.device, clues, arguments.repeats)
        whole = row["baselines_ms"]["whole_step"]
        print(f"{row['work']}: {row['ours_ms']:.2f} ms of {whole:.1f} ms, {row['share']:.2%}")
        if arguments.out or not tiny:
            save(arguments, "ops", [row])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
