"""Several threads around one LM, and processes that are forked after it was used."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.lm.passes import lm_lock

pytestmark = pytest.mark.slow


KINDS = {
    "top_k": {"clues": "top_k", "k": 4, "rank": 8},
    "generated": {"clues": "none", "generated_lora_rank": 2, "target_modules": "all-linear"},
}


def make(kind: str, lm=None) -> qpeft.QPeftModel:
    model = qpeft.get_qpeft_model(lm or tiny_lm("llama"), qpeft.QPeftConfig(**KINDS[kind]), tiny_tokenizer())
    if model.generated_lora is not None:
        with torch.no_grad():
            for matrix in model.generated_lora.b:
                matrix.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_that_calls_the_lm_itself_gets_what_it_always_gets(kind):
    """In every place of a pass where the other thread may come in between, and 30 times beside `rank`."""
    model = make(kind)
    lm, ids = model.lm, torch.tensor([[5, 6, 7, 8, 9]])

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return (
                lm(input_ids=ids).logits,
                lm.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0),
            )

    expected, found = call(), []
    reranker = qpeft.Reranker(model)
    ranked = reranker.rank(QUERIES[0], DOCUMENTS)
    with ThreadPoolExecutor(1) as other:

        def enter(module, inputs) -> None:
            if threading.get_ident() == here:
                found.append(other.submit(call).result())

        here = threading.get_ident()
        hooks = [module.register_forward_pre_hook(enter) for module in (lm.get_decoder().layers[-1].mlp, lm.model.norm)]
        assert reranker.rank(QUERIES[0], DOCUMENTS) == ranked
        for hook in hooks:
            hook.remove()
        assert found
        beside = [other.submit(call) for _ in range(30)]
        while not beside[-1].done():
            assert reranker.rank(QUERIES[0], DOCUMENTS) == ranked
    for logits, tokens in [*found, *(future.result() for future in beside)]:
        assert torch.equal(logits, expected[0]) and torch.equal(tokens, expected[1])


def test_exclusive_keeps_the_passes_of_other_threads_out():
    lm = tiny_lm("llama")
    reranker, same_lm = (qpeft.Reranker(make("top_k", lm)) for _ in range(2))
    right = reranker.predict(PAIRS)
    with ThreadPoolExecutor(3) as others:
        with reranker.exclusive():
            assert (reranker.predict(PAIRS) == right).all()  # this thread may
            waiting = [others.submit(same_lm.predict, PAIRS), others.submit(reranker.model.score, PAIRS)]
            with torch.no_grad():
                lm.lm_head.weight.mul_(2)
            assert not any(future.done() for future in waiting)
        with reranker.model.exclusive():
            changed = reranker.predict(PAIRS)
        assert (waiting[0].result() == changed).all() and (changed != right).any()
        assert torch.equal(waiting[1].result().query_log_likelihood, torch.tensor(changed))


def test_wrappers_of_an_lm_share_its_lock():
    lm = tiny_lm("llama")
    lock = lm_lock(lm)
    assert lm_lock(torch.compile(lm)) is lock and lm_lock(copy.deepcopy(lm)) is not lock
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert lm_lock(peft.get_peft_model(lm, lora)) is lock


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_is_forked_after_the_first_use_does_not_hang():
    """OpenMP has no threads there; with as many as the parent had, torch would wait for them forever."""
    script = textwrap.dedent(f"""
        import os, signal, sys, torch
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from families.tiny import PAIRS, tiny_lm, tiny_tokenizer
        import qpeft_ext as qpeft
        torch.set_num_threads(2)
        lm = tiny_lm("llama", hidden_size=64, intermediate_size=4096)
        reranker = qpeft.Reranker(qpeft.get_qpeft_model(lm, qpeft.QPeftConfig(clues="none"), tiny_tokenizer()))
        pairs = 8 * PAIRS
        right = reranker.predict(pairs)
        if not os.fork():
            signal.alarm(250)  # should it hang after all
            found = reranker.predict(pairs)
            print("child", bool(abs(found - right).max() < 1e-3), torch.get_num_threads(), flush=True)
            os._exit(0)
        os.wait()
        print("parent", torch.get_num_threads())
    """)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert ended.stdout.splitlines() == ["child True 1", "parent 2"], ended.stderr
    assert ended.stderr.count("start processes by spawn") == 1
