"""Changes that a pass makes in an LM and in torch. Only this module makes them, and restores everything after a pass.

A pass changes an LM for its own thread: a thread that calls the LM itself meanwhile (``lm.generate``) gets what it
always gets. Passes of one LM take turns (`lm_lock`), also where several models and rerankers are built around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock, RLock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from ..utils.memory import raise_if_out_of_memory
from ..utils.torch_state import SharedSetting
from . import feed_forward, norms, rotary
from .attention import OURS, SDPA, this_thread
from .errors import LM_ERRORS
from .own_forward import Forward, in_thread
from .row_wise import RowPicker

Hook = Callable[..., Any]  # a hook of `torch.nn.Module.register_forward_pre_hook` or `register_forward_hook`
_TOLERANCE = 1e-2  # of the largest output: more than bfloat16 rounds, and less than another formula changes

_cudnn_attention = SharedSetting(torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False)
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # not in the LM: a lock cannot be copied or pickled
_lock_of_locks = Lock()


@dataclass(frozen=True, eq=False)
class LMPasses:
    """The passes of one LM, as context managers: each makes the changes of its kind of pass and restores them.

    A context holds the lock of the LM, so that passes of other threads wait.

    Attributes:
        lm: the model.
        attention: configs whose attention implementation becomes `attention.OURS`.
        attention_in_prefixes: whether it does so in passes over prefixes too.
        norms: modules whose ``forward`` becomes that of `norms`.
        feed_forwards: modules whose ``forward`` becomes that of `feed_forward`.
        rotary: files whose rotary embedding becomes ours (`rotary.ours_in`).
        row_wise: modules that compute only the rows which the head reads (`RowPicker`), in suffix passes.
    """

    lm: nn.Module
    attention: Sequence[PreTrainedConfig] = ()
    attention_in_prefixes: bool = False
    norms: Sequence[nn.Module] = ()
    feed_forwards: Sequence[nn.Module] = ()
    rotary: Sequence[str] = ()
    row_wise: Sequence[nn.Module] = ()

    @contextmanager
    def whole(self, updates: Iterable[tuple[nn.Module, Hook]] = ()) -> Iterator[None]:
        """Around a pass over whole prompts, which runs the LM's own code.

        Args:
            updates: forward hooks that change the outputs of modules (`GeneratedLora.updates`).
        """
        with lm_lock(self.lm), without_cudnn_attention(), hooked(after=updates):
            yield

    @contextmanager
    def prefix(self) -> Iterator[None]:
        """Around a pass over document prefixes."""
        configs = self.attention if self.attention_in_prefixes else ()
        with self.whole(), _faster_attention(configs), self._faster_layers():
            yield

    @contextmanager
    def suffix(
        self, rows: Tensor, shape: tuple[int, int], updates: Sequence[tuple[nn.Module, Hook]] = ()
    ) -> Iterator[None]:
        """Around a pass over suffixes.

        Args:
            rows: flat indices into [B·L] of the rows that the head reads, int64 [N], each once.
            shape: (B, L).
            updates: forward hooks that change the outputs of modules; these modules compute all rows.
        """
        updated = {module for module, _ in updates}
        picked = [module for module in self.row_wise if updated.isdisjoint(module.modules())]
        picker = RowPicker(rows, shape)
        pick = hooked([(module, picker.pick) for module in picked], [(module, picker.put_back) for module in picked])
        with self.whole(updates), pick, _faster_attention(self.attention), self._faster_layers():
            yield

    @contextmanager
    def _faster_layers(self) -> Iterator[None]:
        """Around a pass over prefixes or suffixes: what is not attention or a product."""
        forwards: list[tuple[nn.Module, Forward]] = [(module, norms.forward) for module in self.norms]
        forwards += [(module, feed_forward.forward) for module in self.feed_forwards]
        with rotary.ours_in(self.rotary), _own_forwards(forwards):
            yield

    def compiled(self) -> LMPasses:
        """The passes of a compiled decoder: hooks and forwards that come and go would compile it again each time."""
        return replace(self, norms=(), feed_forwards=(), rotary=(), row_wise=())

    def if_same(self, run: Callable[[LMPasses], Tensor], **faster: Any) -> LMPasses:
        """These passes with faster forms, or unchanged if the LM computes something else with those.

        Args:
            run: computes the same output twice, in a context of the passes that it is given: once without any faster
                form, once with ``faster``.
            faster: attributes of `LMPasses`.
        """
        try:
            expected, got = run(LMPasses(self.lm)), run(LMPasses(self.lm, **faster))
        except LM_ERRORS as failure:  # the LM calls these modules in a way of its own
            raise_if_out_of_memory(failure)
            return self
        if not isinstance(expected, Tensor) or (expected.shape, expected.dtype) != (got.shape, got.dtype):
            return self
        error, largest = (got - expected).float().abs().max(), expected.float().abs().max()
        return replace(self, **faster) if error <= _TOLERANCE * largest else self


def lm_lock(lm: nn.Module) -> RLock:
    """The lock of an LM, the same for all models around it; a thread that has it may take it again."""
    lm = without_wrappers(lm)
    with _lock_of_locks:
        return _locks.setdefault(lm, RLock())


def without_wrappers(lm: nn.Module) -> nn.Module:
    """The LM inside a `torch.compile`d one or a `peft` model, whose modules are the LM's own."""
    inner: Any = getattr(lm, "_orig_mod", lm)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Keep `scaled_dot_product_attention` from taking cuDNN's kernels; the user's setting comes back after.

    torch 2.11 and later prefer them on H100, H200 and B200. With an attention mask their backward returns NaN for some
    lengths (pytorch/pytorch issue 196678), and rows that attend to nothing, which left padding makes, may be NaN. With
    them a soft prompt or LoRA, whose gradient goes through left-padded prefixes, was NaN after 5 to 44 steps.

    The backward pass takes the kernel that belongs to the forward's. It is a setting of the process, as torch has no
    other: passes of several threads share it, and the last of them restores it.
    """
    with _cudnn_attention.inside():
        yield


@contextmanager
def hooked(
    before: Iterable[tuple[nn.Module, Hook]] = (),
    after: Iterable[tuple[nn.Module, Hook]] = (),
    with_kwargs: bool = False,
) -> Iterator[None]:
    """While this is entered, modules have forward hooks that act in this thread only.

    Args:
        before, after: modules and the hooks that run before or after their forward.
        with_kwargs: whether the hooks are given keyword arguments too.
    """
    handles: list[RemovableHandle] = []
    try:
        for module, hook in before:
            handles.append(module.register_forward_pre_hook(_in_this_thread(hook), with_kwargs=with_kwargs))
        for module, hook in after:
            handles.append(module.register_forward_hook(_in_this_thread(hook), with_kwargs=with_kwargs))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_this_thread(hook: Hook) -> Hook:
    owner = get_ident()

    def guarded(*args: Any) -> Any:
        if torch.compiler.is_compiling() or get_ident() == owner:
            return hook(*args)
        return None

    return guarded


@contextmanager
def _faster_attention(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Give ``configs`` that say "sdpa" our attention."""
    changed = [config for config in configs if config._attn_implementation == SDPA]
    this_thread.passes += 1
    try:
        for config in changed:
            config._attn_implementation = OURS
        yield
    finally:
        this_thread.passes -= 1
        this_thread.masks.forget()
        for config in changed:
            config._attn_implementation = SDPA


@contextmanager
def _own_forwards(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Give modules a ``forward`` of ours, except those with one of their own by now (a hook of accelerate's)."""
    replaced = [(module, ours) for module, ours in forwards if "forward" not in vars(module)]
    for module, ours in replaced:
        vars(module)["forward"] = in_thread(ours, module, get_ident())
    try:
        yield
    finally:
        for module, _ in replaced:
            del vars(module)["forward"]
