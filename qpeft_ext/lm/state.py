"""Which LM is it, exactly? Versions of an LM (and a soft prompt) in memory, a fingerprint of the content for files."""

from __future__ import annotations

import functools
import hashlib
import json
import weakref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# say nothing about what the LM computes, or differ between two loads of the same LM
_NOT_CONTENT = {
    "_name_or_path",
    "name_or_path",
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
    """One state of one LM, equal to nothing but itself. Part of the key of every cached prefix.

    Attributes: is_current: whether the LM was still in this state when it was last looked at.
    """

    def __init__(self, tracker: LMState) -> None:
        self._tracker = weakref.ref(tracker)
        self._fingerprint: dict[str, str] | None = None

    @property
    def is_current(self) -> bool:
        tracker = self._tracker()
        return tracker is not None and tracker.seen is self

    def fingerprint(self) -> dict[str, str]:
        """`fingerprint_of` the LM; computed once, when a file is read or written for the first time.

        Raises: RuntimeError if the LM has left this state.
        """
        if self._fingerprint is None:
            tracker = self._tracker()
            if tracker is None or tracker.version() is not self:
                raise RuntimeError("the LM is no longer in the state that is asked for")
            self._fingerprint = tracker.fingerprint()
        return self._fingerprint


class LMState:
    """Tells the versions of an LM apart: a parameter that is replaced or written to in place makes a new one, and so
    do other active adapters and another attention implementation. With a soft prompt, versions of the two together.

    A write through ``parameter.data`` leaves no trace in torch; call `DocumentCache.clear` after one.
    """

    _of_module: weakref.WeakKeyDictionary[nn.Module, LMState] = weakref.WeakKeyDictionary()

    def __init__(self, lm: nn.Module, soft_prompt: nn.Module | None = None) -> None:
        self._modules = [weakref.ref(module) for module in (lm, soft_prompt) if module is not None]
        self._state: tuple | None = None
        self._held: list[Tensor] = []
        self.seen: LMVersion | None = None

    @classmethod
    def of(cls, lm: nn.Module, soft_prompt: nn.Module | None = None) -> LMState:
        """The one of this LM: engines of one LM share prefixes. A soft prompt belongs to one LM and has its own."""
        owner = lm if soft_prompt is None else soft_prompt
        if owner not in cls._of_module:
            _count_optimizer_steps()
            cls._of_module[owner] = cls(lm, soft_prompt)
        return cls._of_module[owner]

    @classmethod
    def look_again(cls) -> None:
        """Every LM gets a new version, changed or not."""
        for tracker in cls._of_module.values():
            tracker._state = None

    @property
    def lm(self) -> nn.Module:
        return self._modules[0]()

    def version(self) -> LMVersion:
        """The LM's version now. Cheap: addresses and write counts, no content."""
        parameters = [parameter for module in self._modules for parameter in module().parameters()]
        state = (*((p.data_ptr(), writes(p), p.dtype) for p in parameters), _attention(self.lm), *_adapters(self.lm))
        if state != self._state:
            self._state, self.seen = state, LMVersion(self)
            # kept until the next change, so that no other tensor can take an address of this state
            self._held = [p.detach() for p in parameters]
        return self.seen

    def fingerprint(self) -> dict[str, str]:
        """`fingerprint_of` the LM, and with a soft prompt "soft_prompt", a SHA-256 over it."""
        if len(self._modules) == 1:
            return fingerprint_of(self.lm)
        digest = hashlib.sha256()
        for name, tensor in self._modules[1]().state_dict().items():
            _hash_tensor(digest, name, tensor)
        return LMState.of(self.lm).version().fingerprint() | {"soft_prompt": digest.hexdigest()}


def fingerprint_of(lm: nn.Module) -> dict[str, str]:
    """What an LM computes with, part by part, so that a difference can be named.

    ``weights`` and ``adapter`` are SHA-256 over the name, dtype, shape and bytes of every parameter and buffer: about
    0.55 s per GB on one CPU core, 7 s for a Llama-2-7B in bfloat16.
    Returns: {"model_type", "dtype", "attention", "config", "weights", "adapter"}; "adapter" is "" where there is none.
    """
    config = {name: value for name, value in lm.config.to_dict().items() if name not in _NOT_CONTENT}
    weights, adapter = hashlib.sha256(), hashlib.sha256()
    adapters = json.dumps([list(map(str, state)) for state in _adapters(lm)])
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
        "dtype": str(next(lm.parameters()).dtype).removeprefix("torch."),
        "attention": _attention(lm),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "adapter": "" if adapters == "[]" else adapter.hexdigest(),
    }


def writes(tensor: Tensor) -> int:
    """How often it was written to in place; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


@functools.cache
def _count_optimizer_steps() -> None:
    """From now on a step of an optimizer counts as a write to its parameters: fused ones write without counting."""

    def count(optimizer: torch.optim.Optimizer, *_) -> None:
        torch.autograd.graph.increment_version([p for group in optimizer.param_groups for p in group["params"]])

    register_optimizer_step_post_hook(count)


def _attention(lm: nn.Module) -> str:
    return str(getattr(lm.config, "_attn_implementation", None))


def _adapters(lm: nn.Module) -> list[tuple]:
    """State of every layer of an adapter that is not in its parameters: which are active, merged, how scaled."""
    return [
        (
            tuple(module.active_adapters),
            bool(module.disable_adapters),
            tuple(module.merged_adapters),
            tuple(sorted((name, float(value)) for name, value in getattr(module, "scaling", {}).items())),
        )
        for module in lm.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters")
    ]


def _is_adapter(name: str) -> bool:
    return any(
        part.startswith(("lora_", "ia3_", "hada_", "lokr_", "oft_", "vera_", "boft_")) for part in name.split(".")
    )


def _hash_tensor(digest, name: str, tensor: Tensor) -> None:
    tensor = tensor.detach()
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):  # in pieces, so that a tensor on a device is never copied whole
        digest.update(flat[start : start + _CHUNK].cpu().numpy())
