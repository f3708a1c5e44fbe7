"""One place changes the LM: what a pass sets is set in its thread only, and restored however the pass ends."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.lm.attention import OURS, SDPA
from qpeft_ext.lm.passes import LMPasses, lm_lock
from qpeft_ext.lm.rotary import files_with_ours

PACKAGE = Path(qpeft.__file__).parent
ROWS = torch.arange(3)


def llama_passes() -> LMPasses:
    """The passes of a tiny Llama with all faster forms, whether they are faster on this machine or not."""
    lm = tiny_lm("llama")
    last = lm.model.layers[-1]
    return LMPasses(
        lm,
        attention=[lm.config],
        attention_in_prefixes=True,
        norms=[module for module in lm.modules() if "Norm" in type(module).__name__],
        feed_forwards=[layer.mlp for layer in lm.model.layers],
        rotary=files_with_ours(lm.model),
        row_wise=[last.self_attn.o_proj, last.mlp],
    )


def changes(lm) -> tuple:
    """What is not as transformers has made it."""
    modules = list(lm.modules())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return lm.config._attn_implementation, sum("forward" in vars(module) for module in modules), hooks


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("whole", (SDPA, 0, 1)), ("prefix", (OURS, 5 + 2, 0)), ("suffix", (OURS, 5 + 2, 5))],
)
def test_every_pass_restores_the_lm(kind, expected):
    passes = llama_passes()
    update = (passes.lm.model.layers[0].mlp, lambda *_: None)
    contexts = {
        "whole": lambda: passes.whole([update]),
        "prefix": passes.prefix,
        "suffix": lambda: passes.suffix(ROWS, (1, 3), [update]),
    }
    assert changes(passes.lm) == (SDPA, 0, 0)
    with contexts[kind]():
        assert changes(passes.lm) == expected
    assert changes(passes.lm) == (SDPA, 0, 0)
    with pytest.raises(KeyError), contexts[kind]():
        raise KeyError
    assert changes(passes.lm) == (SDPA, 0, 0)


@pytest.mark.parametrize("kind", ["whole", "prefix"])
def test_a_pass_has_the_lock_of_its_lm(kind):
    passes = llama_passes()
    with ThreadPoolExecutor(1) as other, getattr(passes, kind)():
        lock = lm_lock(passes.lm)
        assert not other.submit(lock.acquire, blocking=False).result()
    assert lock.acquire(blocking=False)
    lock.release()


def test_a_module_with_an_update_computes_all_rows():
    passes = llama_passes()
    mlp = passes.lm.model.layers[-1].mlp
    for inside, picked in ((mlp, 1), (mlp.down_proj, 1), (passes.lm.model.layers[0].mlp, 2)):
        with passes.suffix(ROWS, (1, 3), [(inside, lambda *_: None)]):
            assert sum(bool(module._forward_pre_hooks) for module in passes.row_wise) == picked


def test_a_faster_form_is_kept_only_if_it_agrees():
    passes = LMPasses(tiny_lm("llama"))
    norms = [passes.lm.model.norm]

    def outputs(*found):
        given = iter(found)
        return lambda _: next(given)

    same, other = torch.ones(3), torch.tensor([1.0, 1.0, 1.02])
    assert passes.if_same(outputs(same, same * 1.005), norms=norms).norms == norms
    assert passes.if_same(outputs(same, other), norms=norms) is passes
    assert passes.if_same(outputs(same, same.double()), norms=norms) is passes
    assert passes.if_same(outputs(same, torch.full((3,), torch.nan)), norms=norms) is passes

    def fails(tried: LMPasses) -> torch.Tensor:
        if tried.norms:
            raise TypeError("no such argument")
        return same

    assert passes.if_same(fails, norms=norms) is passes

    def too_large(tried: LMPasses) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        passes.if_same(too_large, norms=norms)


def test_nothing_else_changes_the_lm():
    """No other file registers a forward hook or sets an attention implementation or a ``forward``.

    But for `compare.cost`, whose hook counts tokens and changes nothing.
    """
    change = re.compile(r"register_forward|_attn_implementation\s*=[^=]|\.forward\s*=[^=]|\[\"forward\"\]\s*=[^=]")
    found = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if change.search(path.read_text("utf-8"))}
    assert found == {Path("lm/passes.py"), Path("compare/cost.py")}


def test_a_suffix_pass_of_a_model_is_changed_in_its_thread_only():
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), ThreadPoolExecutor(1) as other:
        expected = model.lm(input_ids=ids).logits
        with model.engine.lm_passes.suffix(torch.tensor([1]), (1, 3)):
            here = model.lm(input_ids=ids).logits
            there = other.submit(torch.no_grad()(model.lm), input_ids=ids).result().logits
    assert torch.equal(there, expected)
    torch.testing.assert_close(here[:, 1], expected[:, 1])
    assert not torch.allclose(here[:, 2], expected[:, 2])  # this row was left out
