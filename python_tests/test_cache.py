"""DocumentCache: budget, order of eviction, keys."""

import pytest
import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.prefix_cache import LayerKV, PrefixKV


def prefix(slots: int) -> PrefixKV:
    keys = torch.zeros(1, 1, slots, 4)  # 16 bytes a slot, keys and values: 32
    return PrefixKV([LayerKV(keys, keys.clone(), None)], [slots])


def key(i: int) -> tuple:
    return qpeft.DocumentCache.key("model", [i])


def test_the_least_recently_used_prefix_leaves_first():
    cache = qpeft.DocumentCache(max_bytes=96)
    for i in range(3):
        cache.put(key(i), prefix(1))
    assert cache.get(key(0)) is not None  # now 1 is the oldest
    cache.put(key(3), prefix(1))
    assert [cache.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
    assert (cache.nbytes, cache.evictions, cache.hits, cache.misses) == (96, 1, 4, 1)


def test_the_budget_is_never_exceeded():
    cache = qpeft.DocumentCache(max_bytes=100)
    for slots in (1, 2, 1, 3, 4, 1):
        cache.put(key(slots), prefix(slots))
        assert cache.nbytes <= 100 and cache.nbytes == sum(e.nbytes for e in cache._entries.values())
    assert cache.get(key(4)) is None  # larger than the whole budget: not stored, nothing thrown out for it
    cache.clear()
    assert cache.nbytes == len(cache) == 0


def test_a_wrong_budget_is_an_error():
    with pytest.raises(ValueError, match="max_bytes"):
        qpeft.DocumentCache(-1)


def test_a_changed_text_or_model_misses():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    cache = qpeft.DocumentCache()
    query, document = PAIRS[0]
    model.score([(query, {"id": "1", "text": document})], cache=cache)
    model.score([(query, {"id": "1", "text": document + "!"})], cache=cache)
    assert (cache.hits, cache.misses) == (0, 2)
    stale = model.score([(query, document)], cache=cache).query_log_likelihood
    assert cache.hits == 1
    with torch.no_grad():
        model.lm.get_input_embeddings().weight.mul_(1.5)
    fresh = model.score([(query, document)], cache=cache).query_log_likelihood
    assert cache.hits == 1 and not torch.allclose(fresh, stale)
    assert torch.equal(fresh, model.score([(query, document)]).query_log_likelihood)


def test_a_small_cache_gives_the_same_scores():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    cache = qpeft.DocumentCache(max_bytes=20_000)
    expected = model.score(PAIRS).query_log_likelihood
    for _ in range(3):
        torch.testing.assert_close(model.score(PAIRS, cache=cache).query_log_likelihood, expected)
    assert cache.evictions > 0 and cache.nbytes <= 20_000
