"""DocumentCache: budgets, order of eviction, tiers; a hit in any tier gives the same bits."""

from __future__ import annotations

import pytest
import torch
from families.tiny import DOCUMENTS, FAMILIES, PAIRS, tiny_lm, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_cache import TWO_FILES, filled, key, look, model, prefix, scores, where

import qpeft_ext as qpeft
from qpeft_ext.engine.filling import CacheFilling


def test_the_least_recently_used_prefix_leaves_first():
    cache = qpeft.DocumentCache(max_bytes=3 * 128)
    for i in range(3):
        cache.put(key(i), prefix(i))
    assert look(cache, 0)  # now 1 is the oldest
    cache.put(key(3), prefix(3))
    assert [look(cache, i) for i in range(4)] == [True, False, True, True]
    assert (cache.nbytes, cache.evictions, cache.hits, cache.misses) == (3 * 128, 1, 4, 1)
    cache.clear()
    assert cache.nbytes == len(cache) == 0 and not look(cache, 0)


def test_prefixes_move_down_and_up(tmp_path):
    cache = qpeft.DocumentCache(2 * 128, host_bytes=2 * 128, disk=tmp_path, disk_bytes=TWO_FILES)
    for i in range(7):
        cache.put(key(i), prefix(i))
    assert [where(cache, i) for i in range(7)] == ["", "disk", "disk", "host", "host", "device", "device"]
    assert look(cache, 3)  # up from the host; 5 goes down in its stead
    assert [where(cache, i) for i in (3, 4, 5, 6)] == ["device", "host", "host", "device"]
    assert look(cache, 1)  # up from the disk, where it stays; 6 goes down, 4 to the disk, where 2 is the oldest
    assert [where(cache, i) for i in (1, 2, 3, 4, 5, 6)] == ["device disk", "", "device", "disk", "host", "host"]
    assert not look(cache, 0)
    counts = {name: (tier.hits, tier.misses, tier.evictions) for name, tier in cache.tiers.items()}
    assert counts == {"device": (0, 3, 7), "host": (1, 2, 4), "disk": (1, 1, 2)}
    assert (cache.hits, cache.misses) == (2, 1)
    text = repr(cache)
    assert "device: 2 prefixes, 0.0 of 0.0 MiB, 0% hits; host: 2 prefixes" in text and "67% hits in all" in text


def test_what_moves_up_from_the_disk_is_not_overwritten_by_what_is_read_next(tmp_path):
    filled(tmp_path, 4)
    cache = qpeft.DocumentCache(2 * 128, host_bytes=128, disk=tmp_path, disk_bytes=1 << 20)
    for i in (0, 1, 2, 3, 1, 2, 3):
        assert look(cache, i)
    assert cache.tiers["disk"].hits == 4 and cache.tiers["device"].hits + cache.tiers["host"].hits == 3


def test_a_prefix_too_large_for_a_tier_goes_to_the_next():
    cache = qpeft.DocumentCache(0, host_bytes=128)
    cache.put(key(0), prefix(0))
    cache.put(key(1, 5), prefix(1, 5))  # larger than both: nothing is thrown out for it
    assert where(cache, 0) == "host" and look(cache, 0) and where(cache, 0) == "host" and not look(cache, 1, 5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), st.tuples(*[st.integers(0, 900)] * 2))
def test_no_budget_is_ever_exceeded_and_no_wrong_prefix_comes_back(tmp_path_factory, work, budgets):
    folder = tmp_path_factory.mktemp("disk")
    cache = qpeft.DocumentCache(budgets[0], host_bytes=budgets[1], disk=folder, disk_bytes=3000)
    stored = set()
    for is_put, i in work:
        length = 1 + i % 4
        if is_put:
            cache.put(key(i, length), prefix(i, length))
            stored.add(i)
        elif look(cache, i, length):
            assert i in stored
        memory = [tier for tier in (cache._device, cache._host) if tier is not None]
        for tier in memory:
            assert tier.nbytes == sum(entry.nbytes for entry in tier._entries.values()) <= tier.max_bytes
        assert cache._disk.nbytes == sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= 3000
    cache._disk._lock.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_bytes": -1}, "max_bytes"),
        ({"host_bytes": 1.5}, "host_bytes"),
        ({"disk": "here"}, "belong together"),
        ({"disk_bytes": 5}, "belong together"),
    ],
)
def test_a_wrong_budget_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        qpeft.DocumentCache(**options)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tier_gives_the_same_bits(family, tmp_path):
    """Also where layers have windows, and for prefixes of different lengths collated from files."""
    lm = model(tiny_lm(family))
    memory = qpeft.DocumentCache()
    cold, warm = scores(lm, memory), scores(lm, memory)
    torch.testing.assert_close(warm, scores(lm), rtol=0, atol=1e-4)  # sums of up to ten tokens
    host, disk = qpeft.DocumentCache(0, host_bytes=1 << 30), qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)
    for cache in (host, disk):
        assert torch.equal(scores(lm, cache), cold) and cache.hits == 0
        assert torch.equal(scores(lm, cache), warm) and cache.hits == len(DOCUMENTS)
    small = qpeft.DocumentCache(20_000, host_bytes=20_000)  # some prefixes are computed again
    for _ in range(3):
        torch.testing.assert_close(scores(lm, small), cold, rtol=0, atol=1e-4)


def test_a_reranker_has_files_read_ahead(tmp_path, monkeypatch):
    monkeypatch.setattr("qpeft_ext.ranking.scoring._PAIRS_PER_READ", 2)
    lm, asked = model(), []
    disk = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)
    expected = qpeft.Reranker(lm, cache=disk).predict(PAIRS)
    disk.tiers["disk"]._lock.close()  # as the end of a process would
    monkeypatch.setattr("qpeft_ext.prefixes.tiers.prefetch", lambda path, *span: asked.append(path.name))
    cache = qpeft.DocumentCache(1 << 20, disk=tmp_path, disk_bytes=1 << 30)
    reranker = qpeft.Reranker(lm, cache=cache)
    torch.testing.assert_close(reranker.predict(PAIRS), expected, rtol=0, atol=1e-4)
    assert set(asked) == {file.name for file in tmp_path.glob("*.safetensors")}
    assert (cache.tiers["disk"].hits, cache.misses) == (len(DOCUMENTS), 0)
    asked.clear()
    reranker.predict(PAIRS)  # from memory
    assert not asked


def test_only_what_is_in_files_alone_is_announced(tmp_path):
    lm = model()
    batch = lm.encode(PAIRS)
    cache = qpeft.DocumentCache(1 << 20, disk=tmp_path, disk_bytes=1 << 30)
    assert not CacheFilling(lm.engine, cache, False).announce(batch)  # nowhere
    scores(lm, cache)
    assert not CacheFilling(lm.engine, cache, False).announce(batch)  # in memory
    below = qpeft.DocumentCache(0, disk=tmp_path / "2", disk_bytes=1 << 30)
    scores(lm, below)
    assert CacheFilling(lm.engine, below, False).announce(batch) and not CacheFilling(lm.engine, below, True).announce(
        batch
    )  # computed in a batch
    below.tiers["disk"]._lock.close()
    both = qpeft.DocumentCache(1 << 20, disk=tmp_path / "2", disk_bytes=1 << 30)
    scores(lm, both)
    assert not CacheFilling(lm.engine, both, False).announce(batch)  # in a file, and in memory


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_every_tier_gives_the_same_bits(tmp_path):
    """Prefixes go down through pinned memory and come up again while passes run, many times over."""
    lm = model(tiny_lm("llama").cuda())
    memory = qpeft.DocumentCache()
    cold, warm = scores(lm, memory), scores(lm, memory)
    for budget in (0, 9_000, 20_000):
        host = qpeft.DocumentCache(budget, host_bytes=1 << 30)
        disk = qpeft.DocumentCache(budget, host_bytes=16_384, disk=tmp_path / str(budget), disk_bytes=1 << 30)
        for cache in (host, disk):
            assert torch.equal(scores(lm, cache), cold)
            for _ in range(20):
                assert torch.equal(scores(lm, cache), warm)
            assert cache.misses == len(DOCUMENTS)
        assert all(prefix.flat.is_pinned() for prefix in host._host._entries.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_to_the_disk_and_back_bit_by_bit(dtype, tmp_path):
    lm = model(tiny_lm("llama", dtype=dtype))
    memory, disk = qpeft.DocumentCache(), qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)
    for cache in (memory, disk):
        scores(lm, cache)
    assert torch.equal(scores(lm, memory), scores(lm, disk)) and disk.hits == len(DOCUMENTS)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_prefix_read_for_a_gradient_stays_as_it_was(micro_batch, tmp_path):
    """Files are read into memory that is used again; what a backward pass still needs must not lie there."""
    attention = qpeft.QPeftConfig(clues="attention", num_heads=4, rank=8, suffix_micro_batch=micro_batch)
    trained = qpeft.get_qpeft_model(tiny_lm("llama"), attention, tiny_tokenizer())
    disk = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)

    def gradient(cache):
        trained.zero_grad()
        trained(trained.encode(PAIRS), cache=cache, max_tokens_per_batch=50).query_log_likelihood.sum().backward()
        return torch.cat([p.grad.flatten() for p in trained.clues.parameters() if p.grad is not None])

    expected = gradient(None)
    gradient(disk)
    torch.testing.assert_close(gradient(disk), expected, rtol=1e-4, atol=1e-5)
    assert disk.hits > 0
