"""Find out which faster forms the passes of an LM can take. Each is kept only if the LM computes the same with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import feed_forward, norms, rotary
from .attention import configs_worth_ours, is_faster_in_prefixes
from .passes import LMPasses, hooked


def with_faster_attention(passes: LMPasses, decoder: nn.Module, ids: Tensor) -> LMPasses:
    """``passes`` with our attention, if the LM's is "sdpa", ours is faster there and gives the same.

    ids: three tokens, int64 [1, 3].
    """
    configs = configs_worth_ours(passes.lm, decoder)
    if not configs:
        return passes
    mask = torch.tensor([[0, 1, 1]], device=ids.device)
    rows = torch.arange(3, device=ids.device)

    def run(tried: LMPasses) -> Tensor:
        with tried.suffix(rows, (1, 3)):
            return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[0, 1:]

    return passes.if_same(run, attention=configs, attention_in_prefixes=is_faster_in_prefixes(decoder))


def with_faster_layers(passes: LMPasses, decoder: nn.Module) -> LMPasses:
    """``passes`` with our norms, feed-forward layers and rotary embedding, wherever the LM's compute the same."""
    dtype = next(decoder.parameters()).dtype
    modules = [module for module in decoder.modules() if feed_forward.is_ours(module, dtype)]
    passes = replace(passes, feed_forwards=modules, rotary=rotary.files_with_ours(decoder))
    return _with_faster_norms(passes, decoder)


def _with_faster_norms(passes: LMPasses, decoder: nn.Module) -> LMPasses:
    found: list[nn.Module] = []
    for module in decoder.modules():
        if not norms.may_be_ours(module):
            continue
        (weight,) = module.parameters()
        x = torch.linspace(-2, 2, 2 * len(weight)).view(2, -1).to(weight.dtype)

        def run(tried: LMPasses, module: nn.Module = module, x: Tensor = x) -> Tensor:
            with tried.prefix():
                return module(x)

        found += LMPasses(passes.lm).if_same(run, norms=[module]).norms
    return replace(passes, norms=found)


def with_picked_rows(
    passes: LMPasses,
    decoder: nn.Module,
    ids: Tensor,
    run_with_cache: Callable[[], object],
    keys_are_stored: Callable[[], bool],
) -> LMPasses:
    """``passes`` that compute only the rows which are read, in what the LM runs after its last layer's keys.

    Args:
        ids: three tokens, int64 [1, 3].
        run_with_cache: a forward of the decoder with a cache.
        keys_are_stored: whether the last layer has stored its keys in that cache.
    """
    found = _row_wise_modules(decoder, run_with_cache, keys_are_stored)
    read = torch.tensor([1], device=ids.device)

    def run(tried: LMPasses) -> Tensor:
        with tried.suffix(read, (1, 3)):
            return decoder(input_ids=ids, use_cache=False).last_hidden_state[0, 1]

    return passes.if_same(run, row_wise=found)


def _row_wise_modules(decoder: nn.Module, run: Callable[[], object], after: Callable[[], bool]) -> list[nn.Module]:
    """Outermost modules with matrices that are entered when ``after()`` is true, and the query projection beside one.

    Only those that take one tensor and return one with as many rows.
    """
    found: list[nn.Module] = []
    inside: list[nn.Module] = []

    def enter(module: nn.Module, inputs: tuple, named: dict) -> None:
        if after() and not inside and any(parameter.dim() > 1 for parameter in module.parameters()):
            inside.append(module)

    def leave(module: nn.Module, inputs: tuple, named: dict, output: object) -> None:
        if inside and inside[-1] is module:
            inside.pop()
            if len(inputs) != 1 or named or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
                return
            if inputs[0].dim() in (2, 3) and inputs[0].shape[:-1] == output.shape[:-1]:
                found.append(module)

    modules = dict(decoder.named_modules())
    every = modules.values()
    with hooked([(module, enter) for module in every], [(module, leave) for module in every], with_kwargs=True):
        run()
    names = [name.rpartition(".")[0] + ".q_proj" for name, module in modules.items() if module in found]
    return [*found, *(modules[name] for name in dict.fromkeys(names) if name in modules)]
