"""What the clue modules cost inside a cold reranking step: their time ÷ that of the whole step (DESIGN 8: at most 1 %).

    python benchmarks/bench_clue_share.py --device cuda     # Llama-2-7B's shape, random weights, bfloat16
    python benchmarks/bench_clue_share.py                   # a tiny model on the CPU; writes nothing

The step: one query with 100 documents of 200 tokens, no cache: prefixes, clues, suffixes, likelihoods.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, default_dtype, machine, median, peak_bytes, seconds, write
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.prompts.prompt import DocumentPrefix


class Shape(NamedTuple):
    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    documents: int
    document: int  # tokens
    query: int


LLAMA_2_7B = Shape(32, 4096, 11008, 32, 32000, 100, 200, 16)
TINY = Shape(2, 64, 96, 4, 300, 5, 20, 4)


def make_model(shape: Shape, device: torch.device, clues: str) -> qpeft.QPeftModel:
    """A Llama whose weights are drawn on the device: 7 billion numbers take a minute on a CPU."""
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        bos_token_id=0,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        eos_token_id=1,
        max_position_embeddings=1024,
        dtype=default_dtype(device),
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype(device))
    try:
        with torch.device(device):
            lm = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, shape.vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")), bos_token="<s>", eos_token="</s>"
    )
    return qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues=clues), tokenizer)


def make_batch(shape: Shape) -> PairBatch:
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, shape.vocabulary, (length,), generator=random).tolist())

    documents = [
        DocumentPrefix((0, *ids(10), *ids(shape.document), 9), 11, 11 + shape.document, 0)
        for _ in range(shape.documents)
    ]
    return PairBatch([ids(shape.query)], documents, [(0, d) for d in range(shape.documents)])


@torch.no_grad()
def measure(shape: Shape, device: torch.device, clues: str, repeats: int) -> dict:
    """One row: ours_ms is the clue module's, baselines_ms the whole step's, both with every wait for the GPU."""
    model, batch = make_model(shape, device, clues), make_batch(shape)
    scores = model(batch).query_log_likelihood
    if not scores.isfinite().all():
        raise ValueError(f"{clues}: a score is not finite")
    whole = median(seconds(lambda: model(batch), device) for _ in range(repeats)) * 1e3
    alone = median(seconds(lambda: model.compute_clues(batch), device) for _ in range(4 * repeats)) * 1e3
    return {
        "work": f"clue_share/1x100/{clues}",
        "ours_ms": alone,
        "baselines_ms": {"whole_step": whole},
        "ratio": {"whole_step": whole / alone},
        "ours_peak_bytes": peak_bytes(lambda: model.compute_clues(batch), device),
        "baselines_peak_bytes": {"whole_step": peak_bytes(lambda: model(batch), device)},
        "bound_share": None,
        "max_error": None,
        "share": alone / whole,
        "shape": shape._asdict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The clue modules' share of a cold reranking step.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as always on the CPU; no file but --out")
    parser.add_argument("--out", type=Path, help="default results/<machine>_ops.json")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    path = arguments.out or RESULTS / f"{machine(device)}_ops.json"
    tiny = arguments.tiny or device.type == "cpu"
    for clues in ("attention", "top_k"):
        row = measure(TINY if tiny else LLAMA_2_7B, device, clues, arguments.repeats)
        whole = row["baselines_ms"]["whole_step"]
        print(f"{row['work']}: {row['ours_ms']:.2f} ms of {whole:.1f} ms, {row['share']:.2%}")
        if arguments.out or not tiny:
            write(path, device, [row])
    sys.stdout.flush()


if __name__ == "__main__":
    main()
