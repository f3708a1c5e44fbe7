"""Checks that our passes give an LM's own numbers, on two short prompts when an engine is made for the LM.

Many faults have the same effect: a decoder that counts slots where a batch is padded on the left (BART as a causal LM),
one that reads padding, embeddings that are not read as ids are. So these checks compare effects instead of keeping a
list of families: hidden states of a pass against those of the LM's own forward, unpadded and one prompt per pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..lm.errors import LM_ERRORS, in_one_line
from ..lm.packed import is_coarse, is_packed
from ..lm.probe_ids import ordinary_ids
from ..prompts.pairs import PairBatch
from ..prompts.pieces import DocumentPrefix, SuffixPieces
from ..utils.memory import raise_if_out_of_memory

# lengths of two prefixes and of what follows them, so different that a position counted from the wrong end is far off
_PREFIXES, _BETWEEN, _SCORED = (3, 12), 2, (5, 3)
_LARGEST_NOISE = 0.2  # a larger relative error is never taken for rounding


@dataclass
class Findings:
    """Reasons in words; "" where there is none.

    why_not_shared: why a prefix cannot be read once for several suffixes.
    why_unpadded: why prompts of different lengths cannot share a pass.
    """

    why_not_shared: str = ""
    why_unpadded: str = ""


@torch.no_grad()
def check_paths(engine: Any, try_shared: bool) -> Findings:
    """Find out which passes of an engine give the LM's own numbers.

    This takes five to twelve forwards over rows of at most 16 tokens.

    Args:
        engine: the engine of the LM.
        try_shared: whether the path with shared prefixes is tried too.
    Raises: ValueError if even an unpadded prompt in a pass of its own does not give what the LM's own forward gives, or
        an embedding that is no token's cannot be read.
    """
    probe, found, window = _Probe(engine), Findings(), _window_option(engine)
    noise, reason = probe.error(shared=False, together=True)
    why_refused = probe.why_no_vectors()
    if not noise <= probe.rounding:
        unpadded, reason_unpadded = probe.error(shared=False, together=False)
        if not unpadded <= probe.rounding:
            why_refused = reason_unpadded
        found.why_unpadded = f"prompts of different lengths disturb each other in it ({reason})"
        found.why_not_shared = found.why_unpadded
    elif try_shared:
        largest = min(_LARGEST_NOISE, max(probe.rounding, 3 * noise))
        error, reason = probe.error(shared=True, together=True)
        if error <= largest and window:
            with _narrow(engine.decoder.config, window):
                error, reason = _Probe(engine).error(shared=True, together=True)
        if not error <= largest:
            found.why_not_shared = f"it reads a prompt in two parts otherwise than as a whole ({reason})"
    if window and not found.why_unpadded and (found.why_not_shared or not try_shared):
        # behind a window of padding a token sees nothing, which is no number in some LMs (float64 with "eager")
        with _narrow(engine.decoder.config, window):
            error, reason = _Probe(engine).error(shared=False, together=True)
        if not error <= max(probe.rounding, 3 * noise):
            found.why_unpadded = f"prompts of different lengths disturb each other in it ({reason})"
    if why_refused:
        raise ValueError(
            f"this {engine.lm.config.model_type} LM does not give its own scores for embedded tokens ({why_refused}), "
            "which clues need; merge its adapter (merge_and_unload) if it has one, or use another LM"
        )
    return found


def _window_option(engine) -> str | None:
    """Name the option of the config that the check can be repeated with: a window that is narrower than its prompts.

    A cache may drop slots that its LM's masks still show (Moshi), which prompts shorter than the window do not reveal;
    nor do they reveal chunks (Llama 4). Kernels that take the window from each layer would not see a narrower one in
    the config. None: there is no such option.
    """
    packing = getattr(engine, "packing", None)  # there is none where the cache cannot be shared
    if engine.is_encoder_decoder or (packing is not None and not any(layer and layer[-1] for layer in packing.layers)):
        return None
    config = getattr(engine.decoder, "config", None)
    if config is None or config is not engine.lm.config.get_text_config():
        return None
    if config._attn_implementation not in ("eager", "sdpa"):
        return None
    names = ("sliding_window", "attention_chunk_size")
    return next((name for name in names if isinstance(getattr(config, name, None), int)), None)


@contextmanager
def _narrow(config, name: str) -> Iterator[None]:
    window = getattr(config, name)
    setattr(config, name, min(4, window))
    try:
        yield
    finally:
        setattr(config, name, window)


class _Probe:
    """Two pairs, and the outputs of the LM's own forward for them.

    Attributes: rounding: the largest relative error that counts as rounding.
    """

    def __init__(self, engine) -> None:
        self.engine = engine
        between = 0 if engine.is_encoder_decoder else _BETWEEN  # without clues its encoder reads the document only
        room = (engine.context or 1000) - between - max(_SCORED)
        lengths = [max(1, min(length, room)) for length in _PREFIXES]
        ids = ordinary_ids(engine.lm, sum(lengths) + between + sum(_SCORED))

        def take(count: int) -> tuple[int, ...]:
            taken, ids[:] = tuple(ids[:count]), ids[count:]
            return taken

        documents = [DocumentPrefix(take(length), 0, length, 0) for length in lengths]
        self.pieces = SuffixPieces(hints=(), question=(), bare_question=take(between))
        queries = [take(length) for length in _SCORED]
        self.pairs = [PairBatch(queries, documents, [(i, i)]) for i in range(len(lengths))]
        self.both = PairBatch(queries, documents, [(i, i) for i in range(len(lengths))])
        self.expected = [self._own(document.ids, query) for document, query in zip(documents, queries, strict=True)]
        self.rounding = _rounding(engine)

    def _own(self, prefix: tuple[int, ...], query: tuple[int, ...]) -> Tensor:
        logits, hidden = self.engine.own_forward((*prefix, *self.pieces.bare_question), query[:-1])
        return (hidden if self.engine.head.fused else logits)[-len(query) :].float()

    def error(self, shared: bool, together: bool) -> tuple[float, str]:
        """Compute the relative error of the head's inputs, infinite where the pass fails, and words for it.

        The largest error of a pair's tokens counts, for a coarse LM (`is_coarse`) their median: rounding may send a
        token to another expert.

        Args:
            shared: whether prefixes are read first, and suffixes after them.
            together: whether both pairs share a pass.
        """
        try:
            got = self._read(self.both, shared) if together else torch.cat(
                [self._read(pair, shared) for pair in self.pairs])  # fmt: skip
        except LM_ERRORS as error:
            raise_if_out_of_memory(error)
            return float("inf"), in_one_line(error)
        rows = got.float().split([len(expected) for expected in self.expected])
        errors = [(a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
                  for a, b in zip(rows, self.expected, strict=True)]  # fmt: skip
        worst = max(float(e.median() if is_coarse(self.engine.lm) else e.max()) for e in errors)
        return (worst if worst == worst else float("inf")), f"its hidden states are {worst:.1g} off"

    def why_no_vectors(self) -> str:
        """Say why the LM does not read an embedding that is no row of its table, as a clue is; "" if it does."""
        (token, *_), _ = self.both.queries
        vector = 1.5 * self.engine.embed(torch.tensor([[token]], device=self.engine.device))[0]
        rows = self.engine.assemble(self.pairs[0], self.pieces, [1], with_prefix=True)
        try:
            self.engine.outputs(rows, vector)
        except LM_ERRORS as error:  # Gemma 4 looks for its token in the table
            raise_if_out_of_memory(error)
            return in_one_line(error)
        return ""

    def _read(self, batch: PairBatch, shared: bool) -> Tensor:
        rows = self.engine.assemble(batch, self.pieces, [0] * len(batch), with_prefix=not shared)
        prefix = None
        if shared:
            prefix = self.engine.read_prefixes([batch.documents[d].ids for _, d in batch.pairs])
        return self.engine.outputs(rows, None, prefix)


def _rounding(engine) -> float:
    if not is_coarse(engine.lm):
        exact = torch.get_float32_matmul_precision() == "highest"
        return 1e-4 if exact else 0.02
    packed = any(map(is_packed, engine.lm.parameters()))
    return 0.02 if engine.table.dtype == torch.float16 and not packed else 0.06
