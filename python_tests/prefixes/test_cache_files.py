"""The disk tier of a DocumentCache: found again, damaged, full, used by another process."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from families.tiny import DOCUMENTS
from tiny_cache import TWO_FILES, Version, filled, key, look, model, prefix, scores

import qpeft_ext as qpeft
from qpeft_ext.prefixes.files import Damaged, checksum, read_contents, read_prefix
from qpeft_ext.utils.files import AtomicWriter, private_folder, temporary_name


def test_files_are_found_again_and_the_oldest_leaves_first(tmp_path):
    filled(tmp_path)
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)
    assert look(cache, 0) and cache.tiers["disk"].hits == 1
    cache._disk._lock.close()
    again = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=TWO_FILES)
    again.put(key(7), prefix(7))
    assert [look(again, i) for i in (0, 1, 7)] == [True, False, True]
    assert not look(again, 0, version=Version("another lm"))


def test_other_files_of_the_folder_stay(tmp_path):
    """An LM or an index in the folder of a cache is not ours to delete, however small the budget."""
    names = "model.safetensors", "shard-000000.safetensors", f"{'g' * 64}.safetensors", ".notes.tmp"
    others = [tmp_path / name for name in names]
    for file in others:
        file.write_bytes(bytes(10_000))
        os.utime(file, (0, 0))
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=TWO_FILES)
    for i in range(3):
        cache.put(key(i), prefix(i))
    assert (len(cache._disk), cache._disk.evictions) == (2, 1)
    cache._disk.clear()
    assert all(len(file.read_bytes()) == 10_000 for file in others) and cache._disk.nbytes == 0


def test_what_a_killed_process_left_is_removed(tmp_path):
    with private_folder(tmp_path / "folder") as folder:
        name = folder.name
    left = [tmp_path / temporary_name(f"{'a' * 64}.safetensors"), tmp_path / name]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=TWO_FILES)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_folder_belongs_to_one_cache(tmp_path):
    cache = qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)
    with pytest.raises(ValueError, match="in use by another process"):
        qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)
    del cache
    qpeft.DocumentCache(disk=tmp_path, disk_bytes=1 << 20)


def test_files_of_a_disk_that_became_read_only_are_read(tmp_path, monkeypatch, caplog):
    filled(tmp_path, 1)
    cache = qpeft.DocumentCache(0, disk=tmp_path, disk_bytes=1 << 20)

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", read_only)
    assert look(cache, 0) and not caplog.records and len(cache._disk) == 1


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
    for a, b in ((0, 4096), (4096, 8192), (0, 8), (4096, 8184), (12288, 12296)):
        moved = data.copy()
        moved[a : a + 8], moved[b : b + 8] = data[b : b + 8], data[a : a + 8]
        assert checksum(moved) != expected
    assert checksum(data[:-1]) != expected


def test_files_of_the_first_format_are_read(tmp_path):
    """As an earlier version wrote them: the checksum has the sums of the blocks of 4 KiB, and the bytes after them."""
    words = [3 * i for i in range(1024 + 3)]
    data = struct.pack("<1027Q", *words)
    sums = struct.pack("<2Q", sum(words[:512]), sum(words[512:1024]))
    header = {
        "__metadata__": {"format": "qpeft_ext prefixes 1", "checksums": f"{zlib.crc32(sums + data[8192:]):08x}"},
        "aa": {"dtype": "F32", "shape": [2054], "data_offsets": [0, len(data)]},
    }
    text, path = json.dumps(header).encode(), tmp_path / "shard"
    for changed in (data, data[:-1] + b"x"):
        path.write_bytes(struct.pack("<Q", len(text)) + text + changed)
        read = torch.empty(len(data), dtype=torch.uint8)
        with contextlib.nullcontext() if changed == data else pytest.raises(Damaged, match="checksum"):
            read_prefix(read_contents(path).extents["aa"], read)
            assert bytes(read.numpy()) == data


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


@pytest.mark.slow
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


def test_a_file_in_the_place_of_another_is_a_miss(tmp_path, caplog):
    """It is whole and of the right size, and has the keys and values of another document or LM."""

    def written(folder: Path, i: int, version: Version) -> Path:
        cache = qpeft.DocumentCache(0, disk=folder, disk_bytes=1 << 20)
        cache.put(key(0 if folder.name == "other_lm" else i, version=version), prefix(i))
        (file,) = folder.glob("*.safetensors")
        return file

    mine, lm = written(tmp_path / "mine", 0, Version()), Version("another")
    for other, found in (
        (written(tmp_path / "other_document", 1, Version()), False),
        (written(tmp_path / "other_lm", 1, lm), False),
        (written(tmp_path / "the_same", 0, Version()), True),
    ):
        mine.write_bytes(other.read_bytes())
        cache = qpeft.DocumentCache(0, disk=mine.parent, disk_bytes=1 << 20)
        assert look(cache, 0) == found
        cache._disk._lock.close()
    document, other_lm = (record.message for record in caplog.records)
    assert "it is of another document" in document and "it is of another LM" in other_lm
