"""Small caches, and prefixes made of one number."""

from __future__ import annotations

from pathlib import Path

import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer
from safetensors.torch import load_file

import qpeft_ext as qpeft
from qpeft_ext.prefixes.kv import Packing, PrefixKV

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


def filled(folder: Path, count: int = 3) -> None:
    """A disk tier with prefixes 0 … count - 1, left by another process."""
    cache = qpeft.DocumentCache(0, disk=folder, disk_bytes=1 << 20)
    for i in range(count):
        cache.put(key(i), prefix(i))
    cache._disk._lock.close()
