"""Ways in which several suffixes read one document's keys and values: gathered for each pair, or packed in one row.

    python benchmarks/bench_suffix_pass.py --threads 2 --repeats 7

25 M Llama, prefixes of 212 tokens, suffixes of 39. ``8x4``: a training step (8 documents, 4 queries each);
``48x2``: reranking (48 documents, 2 queries each on average).

    ours       each layer gathers the keys of each pair's document as it needs them (`engine.shared_cache.shared_cache`)
    expanded   the whole cache is copied for all pairs before the pass, as transformers' own caches do
    packed     one row a document, followed by its suffixes, which a 4-D mask keeps apart: nothing is
               copied but the keys of the row; needs the mask code of each family, and none exists for ALiBi
    repeated   (``grouped``: four heads share keys and values) ours with transformers' "sdpa", which copies keys and
               values for each head of a group
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from common import Case, main, run_tiny
from random_llama import TINY, RandomIds, Shape, make_model
from torch import Tensor

from qpeft_ext.engine.rows import assemble_rows
from qpeft_ext.engine.shared_cache import shared_cache
from qpeft_ext.prompts.pairs import PairBatch


class Work:
    """The suffixes of every query with every document, whose prefixes are cached."""

    def __init__(self, shape: Shape, documents: int, queries: int, device, backward: bool) -> None:
        self.model = make_model(shape, device, "attention", torch.float32).eval()
        self.queries, self.backward, self.width = queries, backward, shape.width
        ids = RandomIds(shape)
        prefixes = [ids.prefix() for _ in range(documents)]
        pairs = [(q, d) for d in range(documents) for q in range(queries)]
        batch = PairBatch([ids.query() for _ in range(queries)], prefixes, pairs)
        with torch.no_grad():
            self.prefix = self.model.engine.prefill([prefix.ids for prefix in prefixes])
            clues = self.model.compute_clues(batch)
        self.vectors = clues.embeds[clues.mask].requires_grad_(backward)
        self.rows = assemble_rows(batch, self.model.prompt.suffix, clues.mask.sum(1).tolist(), device, False)
        self.prefix_rows = torch.tensor([d for _, d in pairs], device=device)
        self.pairs = torch.arange(len(pairs), device=device)

    def ours(self) -> Tensor:
        return self._log_p(self.prefix, self.prefix_rows)

    def expanded(self) -> Tensor:
        """The read-only layers over a copy that has one prefix a pair."""
        prefix = self.prefix
        copy = type(prefix)(
            [
                type(kv)(*(t.index_select(0, self.prefix_rows) for t in (kv.keys, kv.values)), kv.window)
                for kv in prefix.layers
            ],
            [prefix.lengths[d] for d in self.prefix_rows.tolist()],
        )
        return self._log_p(copy, None)

    def _log_p(self, prefix, prefix_rows: Tensor | None) -> Tensor:
        engine = self.model.engine
        outputs = engine.outputs(self.rows, self.vectors, prefix, prefix_rows)
        return self._result(engine.head.log_likelihood(outputs, self.rows.target_ids))

    def repeated(self) -> Tensor:
        engine = self.model.engine
        passes, engine.lm_passes = engine.lm_passes, replace(engine.lm_passes, attention=())
        try:
            return self.ours()
        finally:
            engine.lm_passes = passes

    def packed(self) -> Tensor:
        engine, rows, P = self.model.engine, self.rows, self.prefix.padded_length
        B, L = rows.ids.shape
        N, packed = B // self.queries, self.queries * L
        embeds = engine.lm.get_input_embeddings()(rows.ids).reshape(B * L, -1)
        embeds = embeds.index_copy(0, rows.clue_slots, self.vectors.to(embeds.dtype)).view(N, packed, -1)
        suffix = torch.arange(packed, device=embeds.device) // L
        mask = (suffix[:, None] == suffix) & torch.ones(packed, packed, dtype=torch.bool, device=embeds.device).tril()
        mask = torch.cat([torch.ones(packed, P, dtype=torch.bool, device=embeds.device), mask], 1)
        passes = replace(engine.lm_passes, attention=(), norms=())
        with passes.suffix(rows.read.slots, (N, packed)):
            hidden = engine.decoder(
                inputs_embeds=embeds, attention_mask=mask.expand(N, 1, -1, -1), use_cache=True,
                position_ids=rows.positions.view(N, packed), **{engine.cache_argument: shared_cache(self.prefix, None)},
            ).last_hidden_state  # fmt: skip
        return self._result(engine.head.log_likelihood(hidden.reshape(B * L, -1)[rows.read.slots], rows.target_ids))

    def _result(self, log_p: Tensor) -> Tensor:
        """Return log p of every query token, or the gradient of the clue vectors."""
        return torch.autograd.grad(log_p.sum(), self.vectors)[0] if self.backward else log_p


def error(ours: Tensor, other: Tensor) -> float:
    """Raises: AssertionError above 1e-4 of the largest number."""
    largest = float((ours - other).abs().max() / ours.abs().max())
    assert largest <= 1e-4, f"differs by {largest:.1e}"
    return largest


def make(shape: Shape, documents: int, queries: int, backward: bool = False):
    def case(device) -> Case:
        work = Work(shape, documents, queries, device, backward)

        def run(name: str):
            return lambda _: torch.set_grad_enabled(backward)(getattr(work, name))()

        B, L = work.rows.ids.shape
        layers, nbytes = shape.layers, 4
        kept = shape.width // shape.groups
        read = 2 * layers * documents * shape.prefix * kept * nbytes
        linear = 2 * layers * ((2 * shape.width + 2 * kept) * shape.width + 3 * shape.width * shape.inner) * B * L
        attended = 4 * layers * shape.width * B * L * (shape.prefix + L / 2)
        flops = (linear + attended) * (2 if backward else 1)
        names = ("expanded", "packed", *(["repeated"] if shape.groups > 1 else ()))
        return Case([None], run("ours"), {name: run(name) for name in names}, error, read, flops)

    return case


WORKS = {
    "tiny": make(replace(TINY, groups=2), 2, 2),
    "suffix_pass/8x4": make(Shape(), 8, 4),
    "suffix_pass/8x4/backward": make(Shape(), 8, 4, backward=True),
    "suffix_pass/48x2": make(Shape(), 48, 2),
    "suffix_pass/8x4/grouped": make(Shape(groups=4), 8, 4),
    "suffix_pass/8x4/grouped/backward": make(Shape(groups=4), 8, 4, backward=True),
    "suffix_pass/48x2/grouped": make(Shape(groups=4), 48, 2),
}


@pytest.mark.parametrize("function", ["ours", "expanded", "packed", "repeated"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("suffix_pass", WORKS, cpu=tuple(WORKS))
