"""Some of the cases of ``make fuzz``, which draws thousands: damaged files give a right result or one line."""

import pytest
import torch
from fuzz.files import KINDS, fuzz

pytestmark = pytest.mark.slow

QUICK = r"^(adapter/adapter_c|lm/config|lora/lm_adapter/adapter_c|data/(corpus|run)|disk|formats|cache/bm25)"


def test_damaged_files(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("QPEFT_CACHE", "")
    try:
        assert fuzz(count=40, seed=0, like=QUICK) == {}
    finally:
        torch.set_num_threads(threads)


def test_every_kind_is_there():
    files = " ".join(kind.file for kind in KINDS)
    for name in (
        "adapter_config adapter_model config.json tokenizer model.safetensors corpus queries qrels run.trec "
        ".gz manifest shard disk sqlite bm25 .part .part.json plan result.json train.jsonl checkpoint "
        "lm_adapter upr dpr rankllm msmarco"
    ).split():
        assert name in files, name
