"""A low-rank update of the LM that the query generates: W + B·diag(g(q))·A, on the query suffix only.

Document prefixes are read with W itself, so they stay shared between queries. The suffix of an encoder–decoder LM is
all that its decoder does, with its attention to the encoder's states; the encoder keeps W. The update is made by
forward hooks, which `lm.passes` registers for a suffix pass and removes after it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..lm.loading import is_encoder_decoder
from ..lm.packed import expect_plain
from ..lm.passes import Hook, hooked
from ..lm.probe_ids import ordinary_ids
from ..prompts.pairs import PairBatch, pad
from ..utils.words import did_you_mean
from .layers import Float32Module

DEFAULT_TARGETS = (
    ("q_proj", "v_proj"),
    ("query_key_value",),
    ("qkv_proj",),
    ("c_attn",),
    ("q", "v"),
)  # tried in this order
ALL_LINEAR = "all-linear"  # peft's word
_PROBE = (2, 5)  # rows and tokens of a pass that tries the layers
_BOTTLENECK = 64  # between the pooled query and the gates of all layers


class GeneratedLora(Float32Module):
    """The query-dependent parameter generator.

    g(q) = 1 + W₂·tanh(W₁·p), where p is the mean of the query's embeddings (rows of E, scaled to root mean square 1).
    At the start W₂ = 0 and B = 0, so the LM is the frozen one. All rows of a batch share one product with A and one
    with B.

    Args:
        lm: the language model, or a `peft` model of it, whose own adapters stay active.
        width: D, of the embeddings.
        rank: of the update.
        target_modules: endings of module names, as in `peft`, or "all-linear" for every linear layer that reads one
            vector for each token, but the head, gates of one output and parts of a `peft` adapter; None takes the first
            of `DEFAULT_TARGETS` that the LM has.
        decoder: the LM's; None: ``lm.get_decoder()``.
    Raises: ValueError for a target that is not there, is no linear layer, has fewer than ``rank`` inputs or outputs, or
        does not see the rows of a batch apart.
    """

    def __init__(self, lm: nn.Module, width: int, rank: int = 16, target_modules: Sequence[str] | None = None,
                 decoder: nn.Module | None = None) -> None:  # fmt: skip
        super().__init__()
        targets = find_targets(lm, target_modules, decoder)
        sizes = {name: _sizes(name, module) for name, module in targets.items()}
        for name, both in sizes.items():
            if rank > min(both):
                raise ValueError(
                    f"QPeftConfig: generated_lora_rank must be at most {min(both)}, the smaller side of "
                    f"{name}, got {rank}"
                )
        self.rank, self.names = rank, list(targets)
        self.targets = list(targets.values())  # a list of modules is no sub-module: they belong to the LM
        self.pool = nn.Linear(width, _BOTTLENECK)
        self.generate = nn.Linear(_BOTTLENECK, len(targets) * rank)
        nn.init.zeros_(self.generate.weight)
        nn.init.zeros_(self.generate.bias)
        self.a = nn.ParameterList([nn.Parameter(torch.randn(rank, n) / n**0.5) for n, _ in sizes.values()])
        self.b = nn.ParameterList([nn.Parameter(torch.zeros(n, rank)) for _, n in sizes.values()])

    def gates(self, queries: Sequence[Sequence[int]], table: Tensor) -> Tensor:
        """g of each query, [Q, layers, rank].

        Args:
            queries: token ids of Q queries.
            table: E, [V, D].
        """
        ids, mask = pad(queries, table.device)
        rows = table[ids].to(self.pool.weight.dtype) * mask[..., None]
        pooled = rows.sum(1) / mask.sum(1, keepdim=True)
        pooled = pooled * pooled.square().mean(1, keepdim=True).clamp_min(1e-30).rsqrt()
        return 1 + self.generate(torch.tanh(self.pool(pooled))).view(len(queries), -1, self.rank)

    def gates_of_pairs(self, batch: PairBatch, table: Tensor) -> Tensor:
        """g of the query of each pair, [B, layers, rank].

        Args:
            batch: B pairs.
            table: E, [V, D].
        """
        used = sorted({query for query, _ in batch.pairs})
        place = {query: i for i, query in enumerate(used)}
        rows = torch.tensor([place[query] for query, _ in batch.pairs], device=table.device)
        return self.gates([batch.queries[query] for query in used], table)[rows]

    def updates(self, gates: Tensor, suffix: Tensor | None = None) -> list[tuple[nn.Module, Hook]]:
        """The target layers, each with the forward hook that adds its update, for `LMPasses`.

        Args:
            gates: of the rows that the LM will read, [B, layers, rank].
            suffix: bool [B, L], the slots that are updated; None: all.
        """
        return [(module, self._hook(layer, gates[:, layer], suffix)) for layer, module in enumerate(self.targets)]

    def _hook(self, layer: int, gate: Tensor, suffix: Tensor | None) -> Hook:
        def add_update(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            x = inputs[0]
            if x.dim() != 3 or len(x) != len(gate):
                raise ValueError(_not_apart(self.names[layer], f"reads {list(x.shape)}", len(gate)))
            a, b = (weight[layer].to(x.device, x.dtype) for weight in (self.a, self.b))
            inner = (x @ a.T) * gate[:, None].to(x.device, x.dtype)
            if suffix is not None:
                inner = inner * suffix[..., None].to(x.device)
            rows = output.reshape(-1, output.shape[-1])
            # a packed layer may give another dtype than it reads
            inner, b = inner.reshape(-1, self.rank).to(rows.dtype), b.to(rows.dtype)
            # In place where nothing is recorded. Otherwise not: the output of a packed layer may be a view, which
            # autograd refuses to have changed.
            updated = torch.addmm(rows, inner, b.T) if torch.is_grad_enabled() else rows.addmm_(inner, b.T)
            return updated.view_as(output)

        return add_update

    @torch.no_grad()
    def merged(self, query: Sequence[int], table: Tensor) -> dict[str, Tensor]:
        """Weights of the suffix pass for one query, W + B·diag(g)·A, by parameter name of the LM.

        Document prefixes are read with W itself. A `peft` adapter on a target is not merged; it keeps adding its part.

        Args:
            query: its token ids.
            table: E, [V, D].
        Raises: ValueError for a layer whose weight is packed.
        """
        gates, weights = self.gates([query], table)[0], {}
        for layer, (name, module) in enumerate(zip(self.names, self.targets, strict=True)):
            base: Any = getattr(module, "base_layer", module)
            expect_plain(base.weight, f"merge_for: nothing can be added to {name}, whose weight")
            update = (self.b[layer] * gates[layer]) @ self.a[layer]
            if _is_transposed(base):
                update = update.T
            place = name if base is module else f"{name}.base_layer"
            weights[f"{place}.weight"] = (base.weight + update).to(base.weight.dtype)
        return weights


def find_targets(
    lm: nn.Module, target_modules: Sequence[str] | None, decoder: nn.Module | None = None
) -> dict[str, nn.Module]:
    """Linear layers of the decoder whose name ends with one of ``target_modules`` (None: see `GeneratedLora`).

    Encoder and head are left out: an encoder reads the document, and the head is not called, only its weight is read.
    A layer with an adapter of `peft` is one layer.
    """
    if decoder is None:
        decoder = cast(Any, lm).get_decoder()
    inside = {id(module) for module in decoder.modules()} - {id(part) for part in _parts_of_adapters(decoder)}
    modules = {name: module for name, module in lm.named_modules() if _is_linear(module) and id(module) in inside}
    unfit = _unfit_layers(lm, modules)
    if target_modules is not None and list(target_modules) == [ALL_LINEAR]:
        fit = {name: module for name, module in modules.items() if _kind(name) not in unfit}
        return {name: module for name, module in fit.items() if _sizes(name, module)[1] > 1}  # no gates
    for wanted in DEFAULT_TARGETS if target_modules is None else (target_modules,):
        found = {name: module for name, module in modules.items() if any(_ends(name, ending) for ending in wanted)}
        if target_modules is None and not found:
            continue
        for ending in wanted:
            if not any(_ends(name, ending) for name in found):
                raise ValueError(_unknown(ending, modules))
        for name in found:
            if _kind(name) in unfit:
                raise ValueError(_not_apart(name, unfit[_kind(name)], _PROBE[0]))
        return found
    raise ValueError(
        "QPeftConfig: none of the generated LoRA's usual target modules is in this LM; name them in "
        "target_modules, e.g. " + ", ".join(sorted({name.rpartition(".")[2] for name in modules})[:8])
    )


def _parts_of_adapters(decoder: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of which layers with an adapter are made: its own, and the linear layer that it is around."""
    for layer in decoder.modules():
        if hasattr(layer, "base_layer"):
            for name, part in layer.named_children():
                if name != "base_layer":
                    yield from part.modules()
                elif _is_linear(layer):
                    yield part


@torch.no_grad()
def _unfit_layers(lm: Any, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Find linear layers that do not compute one vector for each token of each row, in a pass over two rows.

    Some experts of a mixture are not reached by so few tokens. So layers whose names differ in numbers are one kind,
    but not if they differ in words with a number, such as fc1.

    Returns: what such a layer did, by its kind.
    """
    if lm.get_input_embeddings().weight.is_meta:  # nothing can be run
        return {}
    unfit: dict[str, str] = {}
    kinds = {id(module): _kind(name) for name, module in modules.items()}

    def note(module: nn.Module, inputs: tuple, output: object) -> None:
        read = list(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else []
        if read[:-1] != list(_PROBE):
            unfit[kinds[id(module)]] = f"reads {read}"
        elif not isinstance(output, Tensor) or list(output.shape[:-1]) != read[:-1]:
            unfit[kinds[id(module)]] = "gives no tensor with a row for each token"

    ids = torch.tensor(ordinary_ids(lm, _PROBE[0] * _PROBE[1])).view(_PROBE).to(lm.get_input_embeddings().weight.device)
    given = {"decoder_input_ids": ids} if is_encoder_decoder(lm.config) else {}
    with hooked(after=[(module, note) for module in modules.values()]):
        lm(input_ids=ids, **given)
    return unfit


def _kind(name: str) -> str:
    return re.sub(r"(?<![a-zA-Z])\d+", "", name)


def _not_apart(name: str, found: str, rows: int) -> str:
    return (
        f"QPeftConfig: target module {name} {found}, expected [{rows}, L, D]: what does not see the rows apart, as in "
        "a mixture of experts, cannot be updated per query; leave it out of target_modules"
    )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _unknown(ending: str, modules: dict[str, nn.Module]) -> str:
    endings = sorted({name.rpartition(".")[2] for name in modules})
    nearest = did_you_mean(ending, endings, cutoff=0.4) or f"; it has {', '.join(endings)}"
    return f"QPeftConfig: target module {ending!r} is not a linear layer of this LM's decoder{nearest}"


def _is_linear(module: nn.Module) -> bool:
    """Is the module a linear layer, a Conv1D of transformers (GPT-2), or one of these inside an adapter of peft?"""
    base = getattr(module, "base_layer", module)
    return isinstance(base, nn.Linear) or _is_transposed(base)


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _sizes(name: str, module: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer."""
    base: Any = getattr(module, "base_layer", module)
    if _is_transposed(base):
        inputs, outputs = base.weight.shape
        return inputs, outputs
    return base.in_features, base.out_features
