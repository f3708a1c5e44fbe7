"""A reranker and the device's memory: smaller passes after an error, and a budget that is divided."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.engine.memory import FIXED_BYTES, bytes_per_token, plan_memory


@pytest.fixture(scope="module", params=["attention", "top_k", "none"])
def model(request):
    config = qpeft.QPeftConfig(clues=request.param, num_heads=4, k=5, rank=8)
    return qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer())


def test_out_of_memory_halves_the_batch_and_no_other_error_does(model, monkeypatch):
    reranker = qpeft.Reranker(model, max_tokens_per_batch=256)
    expected, forward, tried = reranker.predict(PAIRS), type(model).forward, []

    def failing(self, *args, **options):
        tried.append(options["max_tokens_per_batch"])
        if options["max_tokens_per_batch"] > 64:
            raise torch.OutOfMemoryError("pretended")
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", failing)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, atol=1e-4)
    assert tried == [256, 128, 64]
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: (_ for _ in ()).throw(torch.OutOfMemoryError("always")))
    with pytest.raises(torch.OutOfMemoryError):
        reranker.predict(PAIRS)
    assert reranker.max_tokens_per_batch == 1
    monkeypatch.setattr(type(model), "forward", lambda *a, **o: (_ for _ in ()).throw(RuntimeError("other")))
    with pytest.raises(RuntimeError, match="other"):
        reranker.predict(PAIRS)


LITTLE = """
import resource
from pathlib import Path
import qpeft_ext as qpeft
demo = Path(qpeft.__file__).parent / "demo"
pairs = [("add", f"def f{i}(x): return x + {i} " + "y = 3; " * 150) for i in range(150)]
small, large = (qpeft.Reranker.from_pretrained(demo / "adapter", base_model=demo / "base_lm", device="cpu",
                                               max_tokens_per_batch=tokens) for tokens in (2048, 1 << 20))
expected = small.predict(pairs, show_progress_bar=False)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (100 << 20), resource.RLIM_INFINITY))
print(float(abs(large.predict(pairs, show_progress_bar=False) - expected).max()), large.max_tokens_per_batch)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="not Linux")
def test_a_cpu_without_memory_for_a_large_pass_makes_smaller_ones():
    """The host's allocators have no error type of their own, unlike a GPU's."""
    run = subprocess.run([sys.executable, "-c", LITTLE], capture_output=True, text=True, check=True)
    difference, tokens = map(float, run.stdout.split())
    assert difference < 1e-4 and tokens < 1 << 18
    assert "out of memory: retrying with max_tokens_per_batch=" in run.stderr


@pytest.mark.parametrize("cache_bytes", [None, 20_000, 1 << 20])
def test_out_of_memory_in_a_prefix_pass_halves_the_passes(model, monkeypatch, caplog, cache_bytes):
    expected, prefill = qpeft.Reranker(model).predict(PAIRS), model.engine.prefill

    def failing(prefixes):
        if len(prefixes) > 1:
            raise torch.OutOfMemoryError("pretended")
        return prefill(prefixes)

    monkeypatch.setattr(model.engine, "prefill", failing)
    cache = None if cache_bytes is None else qpeft.DocumentCache(cache_bytes)
    reranker = qpeft.Reranker(model, max_tokens_per_batch=256, cache=cache)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, atol=1e-4)
    assert reranker.max_tokens_per_batch < 256
    assert f"retrying with max_tokens_per_batch={reranker.max_tokens_per_batch}" in caplog.text


def test_a_memory_budget_is_divided(model):
    attention = model.qpeft_config.clues == "attention"
    budget = FIXED_BYTES + (64 << 20)
    plan = plan_memory(model.engine, budget, attention)
    assert plan.max_tokens_per_batch == 2048 and (plan.projected_bytes > 0) == attention
    passes = plan.max_tokens_per_batch * bytes_per_token(model.engine)
    assert FIXED_BYTES + passes + plan.cache_bytes + plan.projected_bytes == budget
    small = plan_memory(model.engine, FIXED_BYTES + 600 * bytes_per_token(model.engine), attention)
    assert small.max_tokens_per_batch == 300
    reranker = qpeft.Reranker(model, max_memory=budget)
    assert (reranker.max_tokens_per_batch, reranker.cache.max_bytes) == (2048, plan.cache_bytes)
    np.testing.assert_allclose(reranker.predict(PAIRS), qpeft.Reranker(model).predict(PAIRS), atol=1e-4)
    for wrong, message in ((FIXED_BYTES, "at least 19"), ("free", "only a CUDA device"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=message):
            qpeft.Reranker(model, max_memory=wrong)
