"""Pairs and documents in groups: each in one, within its budget, with little padding."""

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.engine.groups import prefix_groups, suffix_groups
from qpeft_ext.engine.schedule import document_jobs, prefix_tokens, suffix_jobs
from qpeft_ext.ops.hardware import shape_step


@pytest.fixture(scope="module")
def model():
    return qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())


@pytest.mark.parametrize("max_pairs", [1, 3, 100])
def test_every_pair_is_in_one_pass_and_budgets_are_kept(model, max_pairs):
    queries = ["a" * n for n in (3, 9, 4, 9, 5)]
    documents = ["b" * n for n in range(5, 60, 6)]
    batch = model.encode([(query, document) for query in queries for document in documents])
    for jobs in (document_jobs(batch, max_pairs), suffix_jobs(batch, max_pairs)):
        assert sorted(i for job in jobs for i in job) == list(range(len(batch)))
    for job in document_jobs(batch, max_pairs):
        assert {batch.pairs[i][1] for i in job}.isdisjoint(
            {batch.pairs[i][1] for i in range(len(batch)) if i not in job}
        )
    seen = []
    for group in prefix_groups(batch, 150, 10):
        lengths = [len(batch.documents[d].ids) for d in group]
        assert len(group) == 1 or len(group) * max(lengths) <= 150
        for step in (1, 4):
            for rows in suffix_groups(batch, group, 100, None, 6, True, False, step):
                lengths = [len(batch.queries[batch.pairs[i][0]]) for i in rows]
                assert len(rows) == 1 or len(rows) * max(lengths) <= 100
                seen += rows
    assert sorted(seen) == sorted(2 * list(range(len(batch))))


def test_passes_have_multiples_of_pairs_where_they_can(model):
    batch = model.encode([("a" * (3 + n % 5), "b" * 20 + str(n)) for n in range(45)])
    documents = list(range(len(batch.documents)))
    for max_tokens, max_pairs in ((140, None), (10_000, 11), (10_000, None), (1, None)):
        sizes = []
        for step in (1, 4):
            groups = list(suffix_groups(batch, documents, max_tokens, max_pairs, 1000, True, False, step))
            assert sorted(i for group in groups for i in group) == list(range(45))
            sizes.append([len(group) for group in groups])
        assert max(sizes[1]) <= max(sizes[0])
        assert all(size % 4 == 0 for size in sizes[1][:-1] if size >= 4)
    assert sizes[1] == [1] * 45
    assert {
        (device, dtype): shape_step(torch.device(device), dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.bfloat16, torch.float32)
    } == {
        ("cpu", torch.bfloat16): 8,
        ("cpu", torch.float32): 1,
        ("cuda", torch.bfloat16): 1,
        ("cuda", torch.float32): 1,
    }


def test_fewer_prefixes_are_held_on_a_cpu_unless_they_are_in_memory_anyway():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [prefix_tokens(2048, device, False) for device in (cpu, cuda)] == [1024, 2048]
    assert [prefix_tokens(2048, device, True) for device in (cpu, cuda)] == [16384, 16384]
    assert prefix_tokens(1, cpu, False) == 1  # after halving for want of memory
