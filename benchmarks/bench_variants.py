"""The cost of the variants: the generated LoRA, clues of the candidates, clues of the vocabulary.

    python benchmarks/bench_variants.py --threads 2          # writes results/<machine>_variants.json
    python benchmarks/bench_variants.py --work tiny          # a second, for CI; writes nothing

Ratios are baseline ÷ ours, so the targets read:
    generated_lora/suffix_pass[/backward]    without    ≥ 0.91: at most 10 % on a suffix pass, prefixes in a cache
    source_candidates/<pool>                 document   ≥ 1: one list per query costs no more than one per document
    vocabulary/128k                          one_read   ≥ 0.5: at most two reads of the table

one_read is the faster of a sum and a maximum over the table; textbook stores similarities [T, V].
"""

from __future__ import annotations

import pytest
import torch
from common import POOLS, Case, T, main, run_tiny
from random_llama import TINY, Shape, make_batch, make_model
from timing import normal, seconds

import qpeft_ext as qpeft
from qpeft_ext.adapters.inputs import ClueInputs
from qpeft_ext.adapters.layers import Clues
from qpeft_ext.ops.similarity_topk import round_scores
from qpeft_ext.ops.vocabulary_topk import row_scales, vocabulary_topk
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.prompts.pieces import DocumentPrefix

K, RANK = 10, 16  # RANK: the default of `GeneratedLora`


# ---- the generated LoRA ----------------------------------------------------------------------------------------------


def generated_lora(shape: Shape, backward: bool):
    """Score 4 queries with 8 documents whose prefixes are in a cache, with default clues; also the gradient."""

    def case(device):
        batch, cache = make_batch(shape, queries=4, documents=8), qpeft.DocumentCache(1 << 30)
        models = [make_model(shape, device, "attention", torch.float32, **options)
                  for options in ({"generated_lora_rank": RANK}, {})]  # fmt: skip
        ours, without = models
        with torch.no_grad():
            expected = ours(batch, path="plain").query_log_likelihood
            torch.testing.assert_close(ours(batch).query_log_likelihood, expected, rtol=1e-5, atol=1e-4)
            assert (without(batch).query_log_likelihood - expected).abs().max() > 1e-3, "the update does nothing"
            for model in models:
                model(
                    batch, cache=cache
                )  # prefixes do not depend on the update, so the second model finds them in the cache

        def step(model):
            def run(_):
                model.zero_grad(set_to_none=True)
                with torch.set_grad_enabled(backward):
                    scores = model(batch, cache=cache).mean_query_log_likelihood
                if backward:
                    scores.sum().backward()
                return scores.detach()

            return run

        return Case([None], step(ours), {"without": step(without)}, lambda a, b: 0.0, 0, 0)

    return case


# ---- clues of the candidates -----------------------------------------------------------------------------------------


def source_candidates(queries: int, each: int, shared: bool, D: int = 4096, V: int = 32000, length: int = 200):
    """Compute the clue vectors of all pairs from their token ids."""

    def case(device):
        random = torch.Generator().manual_seed(0)
        frequencies = 1 / torch.arange(1, V - 1).double() ** 1.05

        def ids(count: int) -> tuple[int, ...]:
            return tuple((torch.multinomial(frequencies, count, True, generator=random) + 2).tolist())

        count = each if shared else queries * each
        documents = [DocumentPrefix(words, 0, length, 0) for words in (ids(length) for _ in range(count))]
        pairs = [(q, d if shared else q * each + d) for q in range(queries) for d in range(each)]
        batch = PairBatch([ids(T) for _ in range(queries)], documents, pairs)
        table, allowed = normal(device, V, D).mul_(0.02), torch.ones(V, dtype=torch.bool, device=device)
        modules = {}
        for source in ("candidates", "document"):
            torch.manual_seed(0)
            config = qpeft.QPeftConfig(clues="top_k", k=K, source=source).resolve(D)
            modules[source] = qpeft.TopKClues(config, table, allowed).to(device).eval()

        @torch.no_grad()
        def clues(source: str, batch: PairBatch = batch) -> Clues:
            return modules[source](ClueInputs.from_batch(batch, device, source), table, 1.0)[list(range(len(batch)))]

        def error(ours: Clues, theirs: Clues) -> float:
            assert ours.embeds.shape == theirs.embeds.shape
            # the same as of one document that is all of the query's candidates
            joined = [sum((documents[d].ids for q, d in pairs if q == query), ()) for query in range(queries)]
            whole = [DocumentPrefix(words, 0, len(words), 0) for words in joined]
            expected = clues("document", PairBatch(batch.queries, whole, [(q, q) for q in range(queries)]))
            rows = torch.tensor([q for q, _ in pairs], device=device)
            difference = float((ours.embeds - expected.embeds[rows]).abs().max())
            assert difference < 1e-5, f"clues differ by {difference}"
            return difference

        baselines = {"document": lambda _: clues("document")}
        return Case([None], lambda _: clues("candidates"), baselines, error, 0, 0)

    return case


# ---- clues of the vocabulary -----------------------------------------------------------------------------------------


def vocabulary(per_token: bool, D: int = 4096, V: int = 128_256):
    def case(device):
        table, query = normal(device, V, D).mul_(0.02), normal(device, 1, T, D, seed=1).mul_(0.02)
        mask = torch.ones(1, T, dtype=torch.bool, device=device)
        allowed, norms = torch.ones(1, V, dtype=torch.bool, device=device), row_scales(table)
        reads = {"sum": table.sum, "max": table.amax}
        read = min(reads.values(), key=lambda read: min(seconds(read, device) for _ in range(3)))

        def ours(_):
            ids = vocabulary_topk(query, mask, table, allowed, K, "cosine", per_token, norms)
            return ids.view(-1, K)

        def textbook(_):
            similarity = torch.nn.functional.normalize(query[0].float(), dim=-1).to(table.dtype) @ table.T
            similarity = similarity.float() * norms  # [T, V]
            return (similarity if per_token else similarity.amax(0)[None]).topk(K).indices

        def error(ids, theirs) -> float:
            if theirs.shape != ids.shape:  # one read of the table finds nothing
                return 0.0
            unit = torch.nn.functional.normalize(query[0].double(), dim=-1)

            def scores(ids):
                found = torch.nn.functional.normalize(table[ids].double(), dim=-1) @ unit.T  # [lists, K, T]
                found = found.diagonal(dim1=0, dim2=2).T if per_token else found.amax(2)
                return round_scores(found.float().contiguous())

            assert all(len(set(row)) == K for row in ids.tolist())
            difference = float((scores(ids) - scores(theirs)).abs().max())
            assert difference < (1e-5 if table.dtype == torch.float32 else 1e-2), f"scores differ by {difference}"
            return difference

        baselines = {"one_read": lambda _: read(), "textbook": textbook}
        return Case([None], ours, baselines, error, table.nbytes, 2 * T * D * V)

    return case


def tiny(device):
    """Make small versions of all, check each as the large ones are checked, and time the first."""
    small = {"D": 64, "V": 300}
    checked = [source_candidates(2, 3, True, **small, length=20), vocabulary(False, **small), vocabulary(True, **small)]
    for make in checked:
        case = make(device)
        for baseline in case.baselines.values():
            case.error(case.ours(None), baseline(None))
    generated_lora(TINY, backward=True)(device).ours(None)
    return generated_lora(TINY, backward=False)(device)


WORKS = {
    "tiny": tiny,
    "generated_lora/suffix_pass": generated_lora(Shape(), backward=False),
    "generated_lora/suffix_pass/backward": generated_lora(Shape(), backward=True),
    "source_candidates/1x100": source_candidates(*POOLS["1x100"]),
    "source_candidates/4x8": source_candidates(*POOLS["4x8"]),
    "vocabulary/128k": vocabulary(per_token=False),
    "vocabulary_per_token/128k": vocabulary(per_token=True),
}
CPU = tuple(WORKS)


@pytest.mark.parametrize("function", ["ours", "without"])
def test_tiny(benchmark, function):
    run_tiny(benchmark, WORKS, function)


if __name__ == "__main__":
    main("variants", WORKS, CPU)
