"""The identity of an LM: versions of it (and a soft prompt) in memory, a fingerprint of its content for files."""

from __future__ import annotations

import functools
import hashlib
import json
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .int8 import is_int8
from .packed import plain_parts

# options that do not change what the LM computes, or that differ between two loads of the same LM
_NOT_CONTENT = {
    "_name_or_path",
    "name_or_path",
    "gguf_sha256",
    "transformers_version",
    "use_cache",
    "architectures",
    "dtype",
    "torch_dtype",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
_CHUNK = 64 << 20


class LMVersion:
    """One state of one LM, equal to nothing but itself; a part of the key of every cached prefix."""

    def __init__(self, tracker: LMState) -> None:
        self._tracker = weakref.ref(tracker)
        self._fingerprint: dict[str, str] | None = None

    @property
    def is_current(self) -> bool:
        """Was the LM still in this state when it was last looked at?"""
        tracker = self._tracker()
        return tracker is not None and tracker.seen is self

    def fingerprint(self) -> dict[str, str]:
        """The fingerprint of the LM (`fingerprint_of`), computed when a file is first read or written.

        Raises: RuntimeError if the LM has left this state.
        """
        if self._fingerprint is None:
            tracker = self._tracker()
            if tracker is None or tracker.version() is not self:
                raise RuntimeError("the LM is no longer in the state that is asked for")
            self._fingerprint = tracker.fingerprint()
        return self._fingerprint


class LMState:
    """Tells the versions of an LM apart, or of an LM and its soft prompt together.

    A parameter or buffer (such as frequencies of rotary positions, or weights in 8 bits) that is replaced or written to
    in place makes a new version, and so do other active adapters and another attention implementation. A write through
    ``parameter.data`` leaves no trace in torch; call `DocumentCache.clear` after one.

    Args:
        lm: the language model.
        soft_prompt: of its prefixes, or None.
    """

    _of_module: weakref.WeakKeyDictionary[nn.Module, LMState] = weakref.WeakKeyDictionary()

    def __init__(self, lm: nn.Module, soft_prompt: nn.Module | None = None) -> None:
        self._lm = weakref.ref(lm)
        self._soft_prompt = None if soft_prompt is None else weakref.ref(soft_prompt)
        self._state: tuple | None = None
        self._kept: list[Tensor] = []
        self.seen: LMVersion | None = None

    @classmethod
    def of(cls, lm: nn.Module, soft_prompt: nn.Module | None = None) -> LMState:
        """The state of this LM, shared by all engines of it. A soft prompt belongs to one LM and has its own."""
        owner = lm if soft_prompt is None else soft_prompt
        if owner not in cls._of_module:
            cls._of_module[owner] = cls(lm, soft_prompt)
        return cls._of_module[owner]

    @classmethod
    def look_again(cls) -> None:
        """Give every LM a new version, changed or not."""
        for tracker in cls._of_module.values():
            tracker._state = None

    @property
    def lm(self) -> nn.Module:
        return _alive(self._lm)

    @property
    def soft_prompt(self) -> nn.Module | None:
        return None if self._soft_prompt is None else _alive(self._soft_prompt)

    def version(self) -> LMVersion:
        """The LM's version now. Cheap: addresses and write counts, no content."""
        modules = _modules(self.lm) + ([] if self.soft_prompt is None else _modules(self.soft_prompt))
        own: list[Tensor] = [p for module in modules for p in module._parameters.values() if p is not None]
        own += [buffer for module in modules for buffer in _buffers(module)]
        parameters = [part for p in own for part in plain_parts(p).values()]
        adapters = _states_of(modules)
        state = (*((p.data_ptr(), writes(p), p.dtype) for p in parameters), _attention(self.lm), *adapters)
        if self.seen is None or state != self._state:
            self._state, self.seen = state, LMVersion(self)
            # kept until the next change, so that no other tensor can take an address of this state
            self._kept = [p.detach() for p in parameters]
        return self.seen

    def fingerprint(self) -> dict[str, str]:
        """The fingerprint of the LM (`fingerprint_of`); "soft_prompt" is a SHA-256 over the soft prompt, if any."""
        if self.soft_prompt is None:
            return fingerprint_of(self.lm)
        digest = hashlib.sha256()
        for name, tensor in self.soft_prompt.state_dict().items():
            _hash_tensor(digest, name, tensor)
        return LMState.of(self.lm).version().fingerprint() | {"soft_prompt": digest.hexdigest()}


def _modules(root: nn.Module) -> list[nn.Module]:
    """All modules of a tree, in any order. ``root.modules()`` takes longer, since it makes their names."""
    found = [root]
    for module in found:  # which grows meanwhile
        found += [child for child in module._modules.values() if child is not None]
    return list(dict.fromkeys(found))


def _buffers(module: nn.Module) -> list[Tensor]:
    """The buffers of a module, without rotary tables that passes of other lengths replace (`lm.rope`)."""
    types = getattr(module, "rope_type", None) if module._buffers else None
    kinds = types.values() if isinstance(types, dict) else [types]
    replaced = any("dynamic" in str(kind) or kind == "longrope" for kind in kinds)
    return [
        buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and not (replaced and name.endswith("inv_freq") and "original" not in name)
    ]


def _alive(module: weakref.ref[nn.Module]) -> nn.Module:
    found = module()
    if found is None:
        raise RuntimeError("the LM, or its soft prompt, does not exist any more")
    return found


def fingerprint_of(lm: Any) -> dict[str, str]:
    """Everything that decides what an LM computes, part by part, so that a difference can be named.

    "weights" and "adapter" are SHA-256 over the name, dtype, shape and bytes of every parameter and buffer, which takes
    about 0.55 s per GB on one CPU core, 7 s for a Llama-2-7B in bfloat16.

    Returns: {"model_type", "dtype", "attention", "config", "weights", "adapter"}; "adapter" is "" where there is none.
    """
    config = {name: value for name, value in lm.config.to_dict().items() if name not in _NOT_CONTENT}
    weights, adapter = hashlib.sha256(), hashlib.sha256()
    adapters = json.dumps([list(map(str, state)) for state in _states_of(list(lm.modules()))])
    adapter.update(adapters.encode())
    # a LoRA wraps the layers it changes: without these words their names are the base LM's
    tensors = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor
        for name, tensor in lm.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    for name in sorted(tensors):
        _hash_tensor(adapter if adapters != "[]" and _is_adapter(name) else weights, name, tensors[name])
    return {
        "model_type": lm.config.model_type,
        "dtype": "int8" if is_int8(lm) else str(next(lm.parameters()).dtype).removeprefix("torch."),
        "attention": _attention(lm),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "adapter": "" if adapters == "[]" else adapter.hexdigest(),
    }


def writes(tensor: Tensor) -> int:
    """How often a tensor was written to in place; 0 for an inference tensor, which does not count."""
    _count_optimizer_steps()
    return 0 if tensor.is_inference() else tensor._version


@functools.cache
def _count_optimizer_steps() -> None:
    """Make steps of optimizers count as writes to their parameters from now on: fused ones write without counting."""

    def count(optimizer: torch.optim.Optimizer, *_) -> None:
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(count)


def _attention(lm: nn.Module) -> str:
    return str(getattr(lm.config, "_attn_implementation", None))


def _states_of(modules: list[nn.Module]) -> list[tuple]:
    """The state of every adapter layer that is not in its parameters: active and merged adapters, and their scales."""
    layers: list[Any] = [
        module
        for module in modules
        if hasattr(type(module), "active_adapters") and hasattr(module, "merged_adapters")  # on a module it is slow
    ]
    return [
        (
            tuple(layer.active_adapters),
            bool(layer.disable_adapters),
            tuple(layer.merged_adapters),
            tuple(sorted((name, float(value)) for name, value in getattr(layer, "scaling", {}).items())),
        )
        for layer in layers
    ]


def _is_adapter(name: str) -> bool:
    return any(
        part.startswith(("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_", "boft_")) for part in name.split(".")
    )


def _hash_tensor(digest, name: str, tensor: Tensor) -> None:
    for ending, part in plain_parts(tensor.detach()).items():
        digest.update(f"{name}{ending} {part.dtype} {list(part.shape)}".encode())
        flat = part.contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), _CHUNK):  # in pieces, so that a tensor on a device is never copied whole
            digest.update(flat[start : start + _CHUNK].cpu().numpy())
