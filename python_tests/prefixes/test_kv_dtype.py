"""Keys and values stored in another dtype than the LM's: the same scores from every tier, cached or not."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from families.tiny import DOCUMENTS, FAMILIES, PAIRS, tiny_lm, tiny_tokenizer
from tiny_cache import model, scores
from tiny_index import command, contents, error, make
from tiny_index import scores as scores_of_index

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.engine.causal import CausalEngine
from qpeft_ext.prefixes.index import PrefixIndex
from qpeft_ext.prefixes.int8 import int8_bytes, int8_views
from qpeft_ext.prefixes.kv import LayerKV, Packing, PrefixKV

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cache_folder")]

OTHERS = ("bfloat16", "float16", "int8")  # than the tiny LMs' float32


def restated(x: np.ndarray, axes: tuple[int, ...], with_middle: bool) -> np.ndarray:
    """What 8 bits leave of ``x``: 255 steps between the least and the largest number along ``axes``, in float64."""
    x = x.astype(np.float64)
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    if not with_middle:
        high = np.maximum(high, -low)
        low = -high
    middle, step = (low + high) / 2, (high - low) / 254
    return np.round((x - middle) / np.where(step == 0, 1, step)) * step + middle


def test_int8_rounds_keys_by_channel_and_values_by_token():
    generator = np.random.default_rng(0)
    keys = (generator.normal(size=(1, 2, 5, 3)) + [50, 0, -7]).astype(np.float32)
    values = (generator.normal(size=(1, 2, 5, 4)) * np.arange(5)[:, None]).astype(np.float32)  # token 0 is zero
    keys[0, 1, :, 2] = 0.25  # a channel without spread
    block = torch.full((int8_bytes(2, 5, 3, 4),), 77, dtype=torch.int8)
    assert len(block) == 4 * (2 * 2 * 3 + 5) + 72  # 70 numbers, up to a whole number of float32
    for own, x, expected in zip(
        int8_views(block, 2, 5, 3, 4),
        (keys, values),
        (restated(keys, (2,), True), restated(values, (1, 3), False)),
        strict=True,
    ):
        own.copy_(torch.from_numpy(x))
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            out = torch.empty(1, 2, 9, x.shape[-1], dtype=dtype)[:, :, 2:7]  # where a pass would put it
            own.read_into(out)
            torch.testing.assert_close(
                out, torch.from_numpy(expected).to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5
            )


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_int8_does_not_hide_what_is_not_finite(bad):
    for with_middle, own in zip(
        (True, False), int8_views(torch.empty(int8_bytes(1, 2, 2, 2), dtype=torch.int8), 1, 2, 2, 2), strict=True
    ):
        own.copy_(torch.tensor([[[[bad, 1.0], [2.0, 3.0]]]]))
        out = torch.empty(1, 1, 2, 2)
        own.read_into(out)
        assert (own.middle is not None) == with_middle and not out[0, 0, 0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_split_converts_and_collate_converts_back(dtype):
    keys = torch.randn(3, 2, 6, 4)
    batch = PrefixKV([LayerKV(keys, keys + 1, None), None, LayerKV(keys[:, :, -3:], keys[:, :, -3:], 4)], [6, 2, 4])
    alone = batch.split(dtype)
    again = PrefixKV.collate(alone, torch.float32)
    packing = Packing.of(alone[0])
    assert packing.dtype == dtype
    for i, length in enumerate(batch.lengths):
        assert alone[i].nbytes == alone[i].flat.nbytes == packing.nbytes(length)
        single = PrefixKV.collate(alone[i : i + 1], torch.float32)
        for layer in (0, 2):
            kept = min(length, batch.layers[layer].keys.shape[2])
            own = again.layers[layer].keys[i, :, -kept:]
            torch.testing.assert_close(own, batch.layers[layer].keys[i, :, -kept:], rtol=0, atol=0.04)
            assert torch.equal(own, single.layers[layer].keys[0]) and own.dtype == torch.float32


@pytest.mark.parametrize("family, kv_dtype", [*((family, "int8") for family in FAMILIES), ("llama", "bfloat16")])
def test_every_tier_gives_the_same_bits(family, kv_dtype, tmp_path):
    lm = model(tiny_lm(family))
    memory = qpeft.DocumentCache(kv_dtype=kv_dtype)
    cold, warm = scores(lm, memory), scores(lm, memory)
    assert memory.hits == len(DOCUMENTS) and torch.equal(cold, warm)  # rounded before the first use
    torch.testing.assert_close(cold, scores(lm), rtol=0, atol=0.25)
    assert not torch.equal(cold, scores(lm))
    nothing = qpeft.DocumentCache(0, kv_dtype=kv_dtype)
    host = qpeft.DocumentCache(0, host_bytes=1 << 30, kv_dtype=kv_dtype)
    disk = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30, kv_dtype=kv_dtype)
    for cache in (nothing, host, disk):
        for hits in (0, len(DOCUMENTS)):
            assert torch.equal(scores(lm, cache), cold) and cache.hits == (hits if cache.stores else 0)
    lengths = {document.ids: len(document.ids) for document in lm.encode(PAIRS).documents}
    packing = lm.engine.packing.stored_as(kv_dtype)
    expected = sum(map(packing.nbytes, lengths.values()))
    assert memory.nbytes == host.tiers["host"].nbytes == expected
    assert expected < disk.tiers["disk"].nbytes < expected + 1024 * len(DOCUMENTS)


@pytest.mark.parametrize("kv_dtype", OTHERS)
def test_deterministic_scores_do_not_depend_on_the_cache(kv_dtype):
    lm = model()
    small = qpeft.DocumentCache(2_000, kv_dtype=kv_dtype)  # room for some of the documents
    expected = scores(lm, qpeft.DocumentCache(kv_dtype=kv_dtype), deterministic=True)
    for _ in range(2):
        assert torch.equal(scores(lm, small, deterministic=True), expected)
    for pair, score in zip(PAIRS, expected, strict=True):
        assert torch.equal(lm.score([pair], cache=small, deterministic=True).query_log_likelihood[0], score)


def test_a_wider_dtype_and_the_lms_own_change_nothing(tmp_path):
    lm = model(tiny_lm("llama", dtype=torch.bfloat16))
    expected = scores(lm, qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30))
    for kv_dtype in ("float32", "bfloat16"):
        assert torch.equal(scores(lm, qpeft.DocumentCache(kv_dtype=kv_dtype)), expected)
    own = qpeft.DocumentCache(0, disk=tmp_path / "copy", disk_bytes=1 << 30, kv_dtype="bfloat16")
    scores(lm, own)
    names = [sorted(file.name for file in folder.glob("*.safetensors")) for folder in (tmp_path, tmp_path / "copy")]
    assert names[0] == names[1]  # found again, whether the dtype is said or not


def test_a_folder_may_have_files_of_several_dtypes(tmp_path):
    lm = model()
    for round in range(2):
        for kv_dtype in (None, *OTHERS):
            cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30, kv_dtype=kv_dtype)
            assert cache.kv_dtype == kv_dtype
            scores(lm, cache)
            assert cache.hits == round * len(DOCUMENTS)
            cache.tiers["disk"]._lock.close()


@pytest.mark.parametrize("kv_dtype", OTHERS)
def test_an_index_and_a_cache_on_top_of_it(kv_dtype, tmp_path, monkeypatch):
    lm = model()
    make(tmp_path, lm, kv_dtype=kv_dtype)
    expected = scores_of_index(lm, qpeft.DocumentCache(kv_dtype=kv_dtype))
    with monkeypatch.context() as patch:
        patch.setattr(CausalEngine, "prefill", lambda *_: pytest.fail("a prefix was computed"))
        for cache in (qpeft.DocumentCache(0, index=tmp_path), qpeft.DocumentCache(index=tmp_path, kv_dtype=kv_dtype)):
            torch.testing.assert_close(scores_of_index(lm, cache), expected, rtol=0, atol=0.02)  # batches differ
            assert cache.kv_dtype == kv_dtype and f"keys and values in {kv_dtype}" in repr(cache)
            assert cache.__reduce__()[1][-1] == kv_dtype
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["kv_dtype"], manifest["format"]) == (kv_dtype, "qpeft_ext index 2")
    stored = contents(tmp_path)
    assert {str(flat.dtype) for flat in stored.values()} == {f"torch.{kv_dtype}"}
    make(tmp_path, lm, kv_dtype=kv_dtype)  # nothing is missing
    assert contents(tmp_path).keys() == stored.keys()
    with pytest.raises(ValueError, match=f"has keys and values in {kv_dtype}, expected float32"):
        qpeft.DocumentCache(index=tmp_path, kv_dtype="float32")
    with pytest.raises(ValueError, match=f"in {kv_dtype}, expected the LM's own dtype; use what it was made with"):
        make(tmp_path, lm)


def test_an_index_in_the_lms_own_dtype_is_as_before(tmp_path):
    lm = model()
    make(tmp_path / "a", lm)
    make(tmp_path / "b", lm, kv_dtype="float32")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab"]
    assert manifests[0] == manifests[1] and manifests[0]["format"] == "qpeft_ext index 1"
    del manifests[0]["kv_dtype"]  # as earlier versions wrote it
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifests[0]))
    assert make(tmp_path / "a", lm).missing == 0
    for kv_dtype in (None, "float32"):
        cache = qpeft.DocumentCache(0, index=tmp_path / "a", kv_dtype=kv_dtype)
        scores_of_index(lm, cache)
        assert cache.misses == 0
    with pytest.raises(ValueError, match="in the LM's own dtype, expected int8; .*qpeft index --kv-dtype int8"):
        scores_of_index(lm, qpeft.DocumentCache(0, index=tmp_path / "a", kv_dtype="int8"))
    manifests[0]["kv_dtype"] = "int3"
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifests[0]))
    with pytest.raises(ValueError, match="not a readable manifest .kv_dtype must be one of float32, bfloat16"):
        PrefixIndex(tmp_path / "a")


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_gradients_go_through_the_suffix_alone(kv_dtype, micro_batch):
    """The same gradient from a cold and a warm cache, near the one of exact keys and values."""
    attention = qpeft.QPeftConfig(clues="attention", num_heads=4, rank=8, suffix_micro_batch=micro_batch)
    trained = qpeft.get_qpeft_model(tiny_lm("llama"), attention, tiny_tokenizer())
    cache = qpeft.DocumentCache(kv_dtype=kv_dtype)

    def gradient(cache):
        trained.zero_grad()
        trained(trained.encode(PAIRS), cache=cache, max_tokens_per_batch=50).query_log_likelihood.sum().backward()
        return torch.cat([p.grad.flatten() for p in trained.clues.parameters() if p.grad is not None])

    exact, cold, warm = gradient(None), gradient(cache), gradient(cache)
    assert cache.hits and torch.equal(cold, warm)
    assert torch.nn.functional.cosine_similarity(cold, exact, dim=0) > 0.99


def test_an_unknown_dtype_is_one_line(tmp_path):
    for kv_dtype in ("int3", torch.int8, ["int8"]):
        with pytest.raises(ValueError, match="DocumentCache: kv_dtype must be one of float32, bfloat16, float16, int8"):
            qpeft.DocumentCache(kv_dtype=kv_dtype)
    with pytest.raises(ValueError, match="IndexWriter: kv_dtype"):
        make(tmp_path, kv_dtype="fp8")
    with pytest.raises(ValueError, match="Reranker: kv_dtype is for max_memory's cache"):
        qpeft.Reranker(model(), kv_dtype="int8")
    reranker = qpeft.Reranker(model(), max_memory=1 << 30, kv_dtype="int8")
    assert reranker.cache.kv_dtype == "int8"


def test_the_commands(job, tmp_path, capsys):
    """An index in 8 bits is made, used and continued; a cache without an index takes the option itself."""
    made = ["index", job / "data", "--model", job / "adapter", "--out"]
    exact = size_to_write(command(capsys, *made, tmp_path / "exact"))
    small = size_to_write(command(capsys, *made, tmp_path / "index", "--kv-dtype", "int8"))
    assert small < 0.6 * exact  # the tiny LM has scales of many bytes, and prefixes of a few tokens
    assert "6 of them are there already" in command(capsys, *made, tmp_path / "index", "--kv-dtype", "int8")
    assert "has keys and values in int8, expected the LM's own dtype" in error(capsys, *made, tmp_path / "index")
    data = ["--data", job / "data", "--run", job / "data" / "run.trec"]
    rerank = ["rerank", "--model", job / "adapter", *data, "--output"]
    from_index = [*rerank, tmp_path / "index.trec", "--index", tmp_path / "index"]
    assert "100% cache hits" in command(capsys, *from_index)
    assert json.loads((tmp_path / "index.trec.json").read_text())["settings"]["kv_dtype"] == "int8"
    assert "expected bfloat16" in error(capsys, *from_index, "--kv-dtype", "bfloat16")
    for name, options in (("bytes.trec", ["--cache-bytes", 1 << 20]), ("memory.trec", ["--max-memory", 1 << 30])):
        command(capsys, *rerank, tmp_path / name, *options, "--kv-dtype", "int8")
        for query_id, ranking in formats.read_run(tmp_path / "index.trec").items():
            assert dict(formats.read_run(tmp_path / name)[query_id]) == pytest.approx(dict(ranking), abs=0.02)
    assert "--kv-dtype does nothing without" in error(capsys, *rerank, tmp_path / "no", "--kv-dtype", "int8")
    for arguments in ([*rerank, tmp_path / "no", "--cache-bytes", 9], [*made, tmp_path / "no"]):
        assert "--kv-dtype must be one of float32" in error(capsys, *arguments, "--kv-dtype", "int4")
    assert not (tmp_path / "no").exists()


def size_to_write(said: str) -> float:
    return float(re.search(r"([\d.]+) kB to write", said)[1])
