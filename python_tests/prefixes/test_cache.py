"""DocumentCache: budgets, order of eviction, tiers, keys, files; a hit in any tier gives the same bits."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from families.tiny import DOCUMENTS, FAMILIES, PAIRS, tiny_lm, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext.engine.filling import CacheFilling
from qpeft_ext.prefixes.files import checksum
from qpeft_ext.prefixes.kv import LayerKV, Packing, PrefixKV
from qpeft_ext.utils.files import AtomicWriter

PACKING = Packing(((1, 4, 4, None),), torch.float32)  # 32 bytes a token
TWO_FILES = 1600  # budget for two files of four tokens, of 384 bytes each; a third asks for 1920
CPU = torch.device("cpu")


class Version:
    """Stands for one state of an LM."""

    is_current = True

    def __init__(self, name: str = "lm") -> None:
        self.name = name

    def fingerprint(self) -> dict[str, str]:
        return {"weights": self.name}


VERSION = Version()


def prefix(i: int, length: int = 4) -> PrefixKV:
    return PACKING.unpack(torch.full((PACKING.numel(length),), float(i)), length)


def key(i: int, length: int = 4, version=VERSION):
    return qpeft.DocumentCache.key(version, [i] * length)


def look(cache, i: int, length: int = 4, version=VERSION):
    """Look up one prefix and check that it is the right one."""
    (found,) = cache.fetch([key(i, length, version)], PACKING, CPU)
    if found is not None:
        assert found.lengths == [length]
        assert torch.equal(found.layers[0].values, torch.full((1, 1, length, 4), float(i)))
    return found is not None


def where(cache, i: int) -> str:
    """The tiers that hold prefix i, without touching them."""
    memory = [tier.name for tier in (cache._device, cache._host) if tier is not None and key(i) in tier]
    files = cache._disk.folder.glob("*.safetensors") if cache._disk is not None else ()
    return " ".join(memory + ["disk" for file in files for flat in load_file(file).values() if flat[0] == i])


def model(lm=None, **options) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), qpeft.QPeftConfig(clues="none", **options), tiny_tokenizer())


def scores(of: qpeft.QPeftModel, cache=None, **options) -> torch.Tensor:
    return of.score(PAIRS, cache=cache, **options).query_log_likelihood


# -- order and budgets ----------------------------------------------------------------------------------------------


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


# -- scores ---------------------------------------------------------------------------------------------------------


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


def test_deterministic_scores_are_not_taken_from_batches(tmp_path):
    lm = model()
    expected = scores(lm, deterministic=True)
    for cache in (qpeft.DocumentCache(), qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)):
        scores(lm, cache)
        for _ in range(2):
            assert torch.equal(scores(lm, cache, deterministic=True), expected)
        assert cache.hits == len(DOCUMENTS)


# -- keys: what must not hit ----------------------------------------------------------------------------------------


def changes():
    """Every way in which an LM can become another one: name -> (LM, what changes it)."""

    def lora(lm=None, **options):
        settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
        return peft.get_peft_model(lm or tiny_lm("llama"), peft.LoraConfig(**settings))

    def two_adapters():
        lm = lora()
        lm.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        return lm

    def assign(lm):
        for _ in range(2):  # the second copy may get the first one's address
            lm.load_state_dict({name: 1.1 * value for name, value in lm.state_dict().items()}, assign=True)

    return {
        "in place": (
            tiny_lm,
            lambda lm: (
                lm.get_input_embeddings().weight.data_ptr()
                and torch.no_grad()(lm.get_input_embeddings().weight.mul_)(1.1)
            ),
        ),
        "replaced": (tiny_lm, assign),
        "dtype": (tiny_lm, lambda lm: lm.to(torch.bfloat16)),
        "another attention": (tiny_lm, lambda lm: lm.set_attn_implementation("eager")),
        "another adapter": (two_adapters, lambda lm: lm.set_adapter("other")),
        "no adapter": (lora, lambda lm: lm.base_model.disable_adapter_layers()),
        "scaled": (lora, lambda lm: [m.scale_layer(2.0) for m in lm.modules() if hasattr(m, "scale_layer")]),
        "merged": (lora, lambda lm: lm.merge_adapter()),
    }


@pytest.mark.parametrize("change", changes())
def test_a_changed_lm_misses(change, tmp_path):
    make, apply = changes()[change]
    lm = model(make("llama") if make is tiny_lm else make())
    cache = qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 30)
    cache.put(cache.key(Version(), [1]), prefix(1, 1))
    stale = scores(lm, cache)
    assert cache.hits == 0
    apply(lm.lm)
    fresh = scores(lm, cache)
    assert cache.hits == 0 and torch.equal(fresh, scores(lm))
    if change not in ("another attention", "merged"):  # those compute the same
        assert not torch.allclose(fresh, stale, atol=1e-3)


def test_a_changed_text_or_template_misses():
    query, document = PAIRS[0]
    lm, cache = model(), qpeft.DocumentCache()
    for text in (document, document + "!"):
        lm.score([(query, {"id": "1", "text": text})], cache=cache)
    model(lm.lm, instruction="Another one.").score([(query, document)], cache=cache)
    model(lm.lm, max_document_tokens=3).score([(query, document)], cache=cache)
    assert (cache.hits, cache.misses) == (0, 4)
    model(lm.lm).score([(query, document)], cache=cache)  # another model around the same LM shares
    assert cache.hits == 1


def test_two_lms_share_nothing():
    cache = qpeft.DocumentCache()
    for _ in range(3):  # each may get the addresses of the one before
        scores(model(tiny_lm("llama")), cache)
    assert cache.hits == 0


def test_prefixes_of_an_lm_that_changed_are_not_written(tmp_path):
    lm, cache = model(), qpeft.DocumentCache(1 << 20, disk=tmp_path, disk_bytes=1 << 30)
    scores(lm, cache)
    with torch.no_grad():
        lm.lm.get_input_embeddings().weight.mul_(1.1)
    scores(lm, cache)
    cache._device.max_bytes = 1
    cache.put(cache.key(Version(), [0]), prefix(0, 1))
    for leaving in list(cache._device._entries):
        cache._store(leaving, cache._device.take(leaving), 1)
    assert len(cache._disk) == len(DOCUMENTS) + 1


def test_frozen_dropout_is_never_cached():
    """A LoRA that is not trained must not be dropped from in training: its prefixes are kept."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, lora_dropout=0.5)
    lm = peft.get_peft_model(tiny_lm("llama"), lora)
    lm.requires_grad_(False)
    cache, frozen = qpeft.DocumentCache(), model(lm)
    expected = scores(frozen)
    scores(frozen.train(), cache)
    torch.testing.assert_close(scores(frozen.eval(), cache), expected)


def test_with_a_trained_lora_prefixes_get_gradients_and_are_not_cached():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained, cache = model(peft.get_peft_model(tiny_lm("llama"), lora)), qpeft.DocumentCache()

    def gradients(**options):
        trained.zero_grad()
        trained(trained.encode(PAIRS), **options).query_log_likelihood.sum().backward()
        return {name: p.grad.clone() for name, p in trained.named_parameters() if p.requires_grad}

    expected = gradients(path="plain")
    for _ in range(2):
        ours = gradients(cache=cache)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)
    assert len(cache) == 0 and cache.misses == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_a_trained_lora_makes_another_lm(fused):
    """Fused optimizers do not count their writes (torch 2.13)."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trained, cache = model(peft.get_peft_model(tiny_lm("llama"), lora)), qpeft.DocumentCache()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=0.1, fused=fused)
    stale = scores(trained, cache)
    trained(trained.encode(PAIRS)).query_log_likelihood.sum().backward()
    optimizer.step()
    fresh = scores(trained, cache)
    assert cache.hits == 0 and torch.equal(fresh, scores(trained)) and not torch.allclose(fresh, stale, atol=1e-3)


# -- files ----------------------------------------------------------------------------------------------------------


def filled(folder: Path, count: int = 3) -> None:
    """A disk tier with prefixes 0 … count - 1, left by another process."""
    cache = qpeft.DocumentCache(0, disk=folder, disk_bytes=1 << 20)
    for i in range(count):
        cache.put(key(i), prefix(i))
    cache._disk._lock.close()


def test_files_are_found_again_and_the_oldest_leaves_first(tmp_path):
    filled(tmp_path)
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)
    assert look(cache, 0) and cache.tiers["disk"].hits == 1
    cache._disk._lock.close()
    again = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=TWO_FILES)
    again.put(key(7), prefix(7))
    assert [look(again, i) for i in (0, 1, 7)] == [True, False, True]
    assert not look(again, 0, version=Version("another lm"))


def test_a_folder_belongs_to_one_cache(tmp_path):
    cache = qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)
    with pytest.raises(ValueError, match="in use by another process"):
        qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)
    del cache
    qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)


def truncated(data: bytearray) -> bytearray:
    return data[: len(data) // 2]


def flipped(place: int):
    def damage(data: bytearray) -> bytearray:
        data[place] ^= 64
        return data

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        lambda data: bytearray(),
        lambda data: data + b"more",
        lambda data: bytearray(5000),
        *map(flipped, (0, 7, 8, 12, -1, -64, -128)),
    ],
)
def test_a_damaged_file_is_a_miss_and_one_warning(damage, tmp_path, caplog):
    filled(tmp_path, 1)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(damage(bytearray(file.read_bytes())))
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)
    assert not look(cache, 0) and cache.tiers["disk"].misses == 1
    assert [str(file) in record.message for record in caplog.records] == [True]
    assert not list(tmp_path.glob("*.safetensors")) and cache.tiers["disk"].nbytes == 0
    cache.put(key(0), prefix(0))
    assert look(cache, 0)


def test_any_flipped_bit_is_found(tmp_path):
    """No position of the file can change without a miss, except where it changes nothing that is read."""
    filled(tmp_path, 1)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        file.write_bytes(changed)
        cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)
        look(cache, 0)  # asserts that a hit is right
        assert place < len(whole) - 128 or cache.hits == 0
        cache._disk._lock.close()
        file.write_bytes(whole)


def test_the_checksum_sees_moved_words_and_blocks():
    data = torch.arange(3 * 512 + 5).view(torch.uint8).numpy()
    expected = checksum(data)
    for a, b in ((0, 4096), (4096, 8192), (12288, 12296)):
        moved = data.copy()
        moved[a : a + 8], moved[b : b + 8] = data[b : b + 8], data[a : a + 8]
        assert checksum(moved) != expected
    assert checksum(data[:-1]) != expected


def test_a_full_disk_stops_the_tier_and_not_the_work(tmp_path, monkeypatch, caplog):
    lm, cache = model(), qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)
    expected, written = scores(lm), []

    def write(self, data):
        written.append(len(data))
        if len(written) > 3:  # in the middle of the second file
            raise OSError(errno.ENOSPC, "No space left on device")
        self.stream.write(data)

    monkeypatch.setattr(AtomicWriter, "write", write)
    for _ in range(2):
        torch.testing.assert_close(scores(lm, cache), expected)
    assert len(caplog.records) == 1 and "stores nothing more: No space left on device" in caplog.records[0].message
    assert (len(cache._disk), cache._disk.hits) == (1, 1)
    assert sorted(os.listdir(tmp_path))[0] == ".lock" and len(os.listdir(tmp_path)) == 2


def test_another_process_finds_the_files_of_the_same_lm_only(tmp_path):
    script = (
        "import sys, json, torch; sys.path.insert(0, sys.argv[2]); torch.set_num_threads(1)\n"
        "import qpeft_ext as qpeft; from tiny import PAIRS, tiny_lm, tiny_tokenizer\n"
        "cache = qpeft.DocumentCache(0, disk=sys.argv[1], disk_bytes=1 << 30)\n"
        "hits = []\n"
        "for change in (1.0, 1.0 + 1e-6):\n"  # one weight differs in its last bits
        "    lm = tiny_lm('llama')\n"
        "    with torch.no_grad(): lm.model.layers[0].mlp.up_proj.weight[3, 5] *= change\n"
        "    model = qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues='none'), tiny_tokenizer())\n"
        "    model.score(PAIRS, cache=cache)\n"
        "    hits.append(cache.hits)\n"
        "print(json.dumps(hits))\n"
    )
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 30)
    scores(model(), cache)
    cache._disk._lock.close()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path), str(Path(__file__).parents[1] / "families")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [len(DOCUMENTS)] * 2


def test_split_and_collate_lose_nothing():
    keys = torch.randn(3, 2, 6, 4)
    batch = PrefixKV([LayerKV(keys, keys + 1, None), None, LayerKV(keys[:, :, -3:], keys[:, :, -3:], 4)], [6, 2, 4])
    alone = batch.split()
    again = PrefixKV.collate(alone)
    for i, length in enumerate(batch.lengths):
        assert alone[i].flat.numel() == Packing.of(batch).numel(length)
        for kv, expected in ((again.layers[0], batch.layers[0]), (again.layers[2], batch.layers[2])):
            kept = min(length, kv.keys.shape[2])
            assert torch.equal(kv.keys[i, :, -kept:], expected.keys[i, :, -kept:])
            assert not kv.values[i, :, : kv.values.shape[2] - kept].any()
