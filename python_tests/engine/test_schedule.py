"""The schedule from numbers alone: which documents and pairs share a pass. No LM is read."""

import random
from itertools import product

import pytest
import torch

from qpeft_ext.engine.groups import READ_TOKENS_IN_TIME, READ_TOKENS_PER_TOKEN, suffix_groups
from qpeft_ext.engine.schedule import CLUE_BYTES, Limits, schedule
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.prompts.pieces import DocumentPrefix

CPU, FLOAT32 = torch.device("cpu"), torch.float32


def batch_of(queries: int = 7, documents: int = 20, pairs: int = 90, seed: int = 0) -> PairBatch:
    """A ragged batch: queries of 1 to 12 tokens, documents of 1 to 200."""
    draw = random.Random(seed)
    lengths = [draw.randint(1, 200) for _ in range(documents)]
    return PairBatch(
        [(5,) * draw.randint(1, 12) for _ in range(queries)],
        [DocumentPrefix((7,) * length, 0, length, 0) for length in lengths],
        [(draw.randrange(queries), draw.randrange(documents)) for _ in range(pairs)],
    )


def limits(**given) -> Limits:
    return Limits(**{"device": CPU, "dtype": FLOAT32, "max_tokens": 400, **given})


def document_length(batch: PairBatch, document: int) -> int:
    return len(batch.documents[document].ids)


CASES = {
    "shared": {},
    "whole prompts": {"shared": False},
    "prefilled": {"prefilled": True},
    "read in place": {"prefilled": True, "in_place": True},
    "with a gradient": {"with_grad": True, "micro_batch": 3},
    "at most four pairs": {"max_pairs": 4},
    "attention clues": {"clue_per_token": True},
    "deterministic": {"deterministic": True},
    "unpadded": {"unpadded": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "on a GPU": {"device": torch.device("cuda")},
    "no room": {"max_tokens": 1},
}


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(3))
def test_each_pair_is_in_exactly_one_suffix_pass_after_its_document(given, seed):
    batch = batch_of(seed=seed)
    passes = list(schedule(batch, limits(**given)))
    read = [pair for one in passes for pairs in one.suffixes for pair in pairs]
    assert sorted(read) == list(range(len(batch)))
    documents = [document for one in passes for document in one.documents]
    assert sorted(documents) == sorted({document for _, document in batch.pairs})
    for one in passes:
        for pairs in one.suffixes:
            assert pairs and {batch.pairs[pair][1] for pair in pairs} <= set(one.documents)


@pytest.mark.parametrize("max_tokens, with_grad", list(product([60, 400, 3000], [False, True])))
def test_documents_and_suffixes_keep_their_budgets(max_tokens, with_grad):
    batch = batch_of()
    kept = limits(max_tokens=max_tokens, with_grad=with_grad)
    for one in schedule(batch, kept):
        longest = max(document_length(batch, document) for document in one.documents)
        assert len(one.documents) == 1 or len(one.documents) * longest <= kept.document_tokens
        for pairs in one.suffixes:
            query = max(len(batch.queries[batch.pairs[pair][0]]) for pair in pairs)
            longest = max(document_length(batch, batch.pairs[pair][1]) for pair in pairs)
            assert len(pairs) == 1 or len(pairs) * (query + longest // READ_TOKENS_PER_TOKEN) <= max_tokens
    assert kept.document_tokens == (max_tokens if with_grad else max_tokens // 2)  # on a CPU


def test_whole_prompts_count_with_their_documents():
    batch = batch_of()
    for one in schedule(batch, limits(shared=False)):
        assert not one.shared
        for pairs in one.suffixes:
            prompts = [
                len(batch.queries[q]) + document_length(batch, d) for q, d in map(batch.pairs.__getitem__, pairs)
            ]
            assert len(pairs) == 1 or len(pairs) * max(prompts) <= 400


def cost(groups: list[list[int]], computed: list[int], read: list[int], worth: int) -> float:
    """Tokens that passes over these groups take the time of."""
    return sum(
        worth + len(group) * (max(computed[i] for i in group) + max(read[i] for i in group) / READ_TOKENS_IN_TIME)
        for group in groups
    )


@pytest.mark.parametrize("worth", [0, 5, 64, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_passes_take_the_least_time_of_all_that_keep_an_order(seed, worth):
    draw = random.Random(seed)
    batch = batch_of(queries=9, documents=9, pairs=9, seed=seed)
    batch.pairs[:] = [(i, draw.randrange(9)) for i in range(9)]
    computed = [len(query) for query in batch.queries]
    read = [document_length(batch, document) for _, document in batch.pairs]
    groups = list(suffix_groups(batch, list(range(9)), 150, None, worth, True, False))
    assert sorted(i for group in groups for i in group) == list(range(9))
    orders = (
        sorted(range(9), key=lambda i: (-computed[i], -read[i])),
        sorted(range(9), key=lambda i: (-read[i], -computed[i])),
    )
    costs = []
    for order, borders in product(orders, product([False, True], repeat=8)):
        ends = [place + 1 for place, border in enumerate(borders) if border] + [9]
        way = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        tokens = [max(computed[i] for i in group) + max(read[i] for i in group) // 8 for group in way]
        if all(len(group) == 1 or len(group) * each <= 150 for group, each in zip(way, tokens, strict=True)):
            costs.append(cost(way, computed, read, worth))
    assert cost(groups, computed, read, worth) == pytest.approx(min(costs))


def test_documents_that_are_read_where_they_lie_need_no_group():
    batch = batch_of(documents=60, pairs=300)
    (one,) = schedule(batch, limits(max_tokens=2000, prefilled=True, in_place=True))
    together = list(schedule(batch, limits(max_tokens=2000, prefilled=True)))
    assert 1 < len(together) < len(list(schedule(batch, limits(max_tokens=2000))))  # reading costs less than computing
    for pairs in one.suffixes:
        longest = max(document_length(batch, batch.pairs[pair][1]) for pair in pairs)
        query = max(len(batch.queries[batch.pairs[pair][0]]) for pair in pairs)
        assert len(pairs) * (query + longest // READ_TOKENS_PER_TOKEN) <= 2000


@pytest.mark.parametrize("given, most", [
    ({"deterministic": True, "max_pairs": 8}, 1), ({"unpadded": True}, 1), ({"max_pairs": 4}, 4),
    ({"max_pairs": 4, "micro_batch": 2}, 4), ({"max_pairs": 4, "micro_batch": 2, "with_grad": True}, 2),
    ({"micro_batch": 5, "with_grad": True}, 5),
])  # fmt: skip
def test_pairs_in_a_pass_at_most(given, most):
    passes = list(schedule(batch_of(), limits(max_tokens=1 << 20, **given)))
    assert max(len(pairs) for one in passes for pairs in one.suffixes) == most
    if most == 1:
        assert all(len(one.documents) == 1 for one in passes)


def test_pairs_of_a_pass_share_a_rotary_table():
    batch = batch_of()
    tables = [3 * (document_length(batch, document) > 100) for _, document in batch.pairs]
    passes = list(schedule(batch, limits(prefilled=True), tables))
    assert sorted(pair for one in passes for pairs in one.suffixes for pair in pairs) == list(range(len(batch)))
    for one in passes:
        own = {tables[pair] for pairs in one.suffixes for pair in pairs}
        assert len(own) == 1 and one.shared == (own == {0})  # prefixes are cached with the first table only
        assert {tables[pair] for pair in one.clues_of} == own


def test_clues_are_computed_together_where_that_saves_work_or_fits():
    batch, vector = batch_of(), CLUE_BYTES // 90 // 5  # bytes of one of the five clues of each of 90 pairs

    def together(**given) -> bool:
        passes = list(schedule(batch, limits(clues_per_pair=5, **given)))
        assert len({id(one.clues_of) for one in passes}) == 1
        return passes[0].clues_of is not None

    assert together(clue_bytes=vector) and not together(clue_bytes=vector + 400)
    assert together(clue_bytes=10 * vector, with_grad=True) and together(clue_bytes=10 * vector, clues_of_lists=True)
    assert not together(clue_bytes=vector, deterministic=True)
    assert not together(clue_bytes=vector, clue_per_token=True)  # the longest query has 12 tokens


def test_an_empty_batch_has_no_pass():
    assert not list(schedule(PairBatch([], [], []), limits()))
