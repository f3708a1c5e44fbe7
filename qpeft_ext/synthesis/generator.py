"""`QueryGenerator`: queries that an LM writes for documents, in the same prompt that it scores them in.

The queries of a document depend on the seed, the document and the LM, but not on the rest of the batch: every row of a
batch draws from a random generator of its own. Between batches only rounding can differ; it changes a token if the
number that is drawn falls on the border between two.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..engine.groups import generation_groups
from ..engine.schedule import default_tokens
from ..model import QPeftModel
from ..prompts.pairs import pad
from ..prompts.prompt import Document
from ..ranking.reranker import Reranker
from ..utils.inputs import whole_number
from ..utils.memory import in_halves

logger = logging.getLogger(__name__)

LOWEST_TEMPERATURE = 1e-6  # logits over a much lower one are infinite, which no draw takes


@dataclass(frozen=True)
class Sampling:
    """Options of how queries are drawn.

    Args:
        queries_per_document: how many queries are drawn for each document.
        temperature: the logits are divided by it, at least 1e-6; 0 takes the likeliest token each time.
        top_p: only the likeliest tokens are drawn that together have this share of the probability.
        top_k: only so many of the likeliest tokens are drawn; 0: all.
        max_new_tokens: a query that has not ended by then is cut.
        seed: seed of the draws.

    Raises: ValueError for an impossible value; TypeError for a number that is not whole.
    """

    queries_per_document: int = 1
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("queries_per_document", 1), ("top_k", 0), ("max_new_tokens", 1)):
            whole_number(getattr(self, name), name, least)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 or above, got {self.temperature}")
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(f"temperature must be 0 or at least {LOWEST_TEMPERATURE}, got {self.temperature}; use 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.temperature == 0 and self.queries_per_document > 1:
            raise ValueError(
                f"temperature 0 writes the same query each time, but queries_per_document is "
                f"{self.queries_per_document}; use a temperature above 0"
            )


@dataclass(frozen=True)
class GeneratedQuery:
    """A query that an LM wrote for a document.

    Attributes:
        text: what the LM wrote, up to the first line end or end token.
        ended: whether there was one.
        log_likelihood: log-likelihood of the text given the document, mean per token, in nats; None where the text has
            no token, or more than ``max_query_tokens``.
        num_tokens: number of tokens of the text.
    """

    text: str
    ended: bool
    log_likelihood: float | None
    num_tokens: int


class QueryGenerator:
    """Writes queries for documents with a causal LM, and scores each as `Reranker` does.

    Args:
        model: a model with ``clues="none"``, of which the LM and the prompt are used.
        sampling: how queries are drawn.
        max_tokens_per_batch: token budget of a batch, new tokens included; None: a budget that suits the device. A
            batch that does not fit in memory is halved.

    Attributes:
        has_end: whether the tokenizer has a line end or an end token; without one no query ends before
            ``max_new_tokens``.

    Raises: ValueError for an encoder–decoder LM, or a model with another score than the likelihood.
    """

    def __init__(self, model: QPeftModel, sampling: Sampling, max_tokens_per_batch: int | None = None) -> None:
        if getattr(model.lm.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(model.lm).__name__} is an encoder–decoder; queries are written by a causal LM")
        if model.answer is not None:
            raise ValueError("queries are chosen by their likelihood; give a model with score='likelihood'")
        self.model, self.sampling = model.eval(), sampling
        self.max_tokens_per_batch = max_tokens_per_batch or 4 * default_tokens(model.device)  # decoding: 1 token a row
        self._scorer = Reranker(model)
        self._ends, self._line_ends = _end_tokens(model)
        self.has_end = bool(self._ends.any())
        words = model.tokenizer("a b", add_special_tokens=False)["input_ids"]
        self._keeps_spaces = " " in model.tokenizer.decode(words).strip()

    def batches(self, documents: Sequence[Document]) -> list[list[int]]:
        """Group documents into batches, the longest first.

        Returns: the indices of the documents of each batch.

        Raises: ValueError if a document does not fit the context of the LM.
        """
        lengths = [len(prompt) for prompt in self._prompts(documents)]
        new = self.sampling.max_new_tokens
        self.model.engine.expect_fits(max(lengths, default=0) + new, "max_new_tokens")
        copies = self.sampling.queries_per_document
        return list(generation_groups(lengths, new, self.max_tokens_per_batch // copies))

    def __call__(self, keys: Sequence[str], documents: Sequence[Document]) -> list[list[GeneratedQuery]]:
        """Write and score the queries of each document.

        Args:
            keys: names of the documents, which their draws depend on.
            documents: the documents.
        """
        copies = self.sampling.queries_per_document
        prompts = [prompt for prompt in self._prompts(documents) for _ in range(copies)]
        seeds = [f"{self.sampling.seed} {i} {key}" for key in keys for i in range(copies)]
        tokens = self._generate(prompts, seeds)
        queries = [self._query(ids) for ids in tokens]
        scored = [i for i, query in enumerate(queries) if query.text and self.model.prompt.fits(query.text)]
        pairs = [(queries[i].text, documents[i // copies]) for i in scored]
        scores = np.asarray(self._scorer.predict(pairs, show_progress_bar=False)) if pairs else ()
        for i, score in zip(scored, scores, strict=True):
            mean = round(float(score) / queries[i].num_tokens, 6)
            queries[i] = replace(queries[i], log_likelihood=mean)
        return [queries[start : start + copies] for start in range(0, len(queries), copies)]

    def _prompts(self, documents: Sequence[Document]) -> list[tuple[int, ...]]:
        """Return the token ids up to where the query begins."""
        prompt = self.model.prompt
        return [prompt.suffix.lay_out(prefix.ids, 0)[0] for prefix in prompt.documents(documents)]

    def _generate(self, prompts: list[tuple[int, ...]], seeds: list[str]) -> list[list[int]]:
        """Call `_continue`, in halves when the device runs out of memory."""

        def generate(rows: Sequence[tuple[tuple[int, ...], str]]) -> list[list[int]]:
            return self._continue([prompt for prompt, _ in rows], [seed for _, seed in rows])

        def warn(half: int) -> None:
            logger.warning("out of memory: generating %d prompts at a time", half)

        return list(in_halves(generate, list(zip(prompts, seeds, strict=True)), warn))

    @torch.no_grad()
    def _continue(self, prompts: list[tuple[int, ...]], seeds: list[str]) -> list[list[int]]:
        """Return new tokens of each prompt, up to the first end, which is kept."""
        model, sampling = self.model, self.sampling
        width = max(map(len, prompts))
        ids, _ = pad([(0,) * (width - len(prompt)) + prompt for prompt in prompts], model.device)
        starts = width - torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        mask = (torch.arange(width, device=model.device) >= starts[:, None]).long()
        processors = LogitsProcessorList()
        if sampling.temperature:
            processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k:
                processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(float(sampling.top_p)))
            processors.append(_Draw(seeds))
        settings = GenerationConfig(  # every option that changes the draws, so that none is the LM's own
            do_sample=False, num_beams=1, max_new_tokens=sampling.max_new_tokens, min_length=0,
            repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True, pad_token_id=0,
        )  # fmt: skip
        stop = StoppingCriteriaList([_AtEnd(self._ends.to(model.device))])
        lm: Any = model.lm  # a peft model generates too, but has no type that says so
        with model.passes(evaluating=True):
            out = lm.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=processors,
                stopping_criteria=stop,
            )
        return [_until_end(row, self._ends) for row in out[:, width:].tolist()]

    def _query(self, ids: list[int]) -> GeneratedQuery:
        """Decode new tokens, of which only the last may be an end."""
        tokenizer = self.model.tokenizer
        ended = bool(ids) and bool(self._ends[ids[-1]])
        if ended and not self._line_ends[ids[-1]]:
            ids = ids[:-1]  # an end token has no text
        if self._keeps_spaces:
            text = tokenizer.decode(ids, skip_special_tokens=True)
        else:  # the tokenizer drops white space, as the demo's does: the pieces are set apart
            text = " ".join(tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True))
        text = " ".join((text.splitlines() or [""])[0].split())
        return GeneratedQuery(text, ended, None, self.model.prompt.count(text))


class _Draw(LogitsProcessor):
    """Draws one token of each row with a number of the row's own generator, and rules out all others."""

    def __init__(self, seeds: Sequence[str]) -> None:
        self.generators = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # summed in the order of the vocabulary; an order by probability would change with the last bit of a logit
        cumulative = scores.double().softmax(-1).cumsum(-1)
        numbers = torch.tensor([[generator.random()] for generator in self.generators], dtype=torch.float64)
        chosen = torch.searchsorted(cumulative, numbers.to(scores.device) * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _AtEnd(StoppingCriteria):
    """Ends a row with its first end token; what it writes after that, until the others have ended, is cut off later."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return self.ends[input_ids[:, -1]]


def _until_end(ids: list[int], ends: Tensor) -> list[int]:
    """Return the tokens up to the first end, which is kept."""
    first = next((n for n, i in enumerate(ids) if ends[i]), len(ids))
    return ids[: first + 1]


def _end_tokens(model: QPeftModel) -> tuple[Tensor, Tensor]:
    """Return which tokens end a query, and which of these do so by a line end in their text; bool, ``[V]`` each."""
    tokenizer, vocabulary = model.tokenizer, len(model.engine.table)
    pieces = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
    line_ends = torch.zeros(vocabulary, dtype=torch.bool)
    line_ends[[i for i, piece in enumerate(pieces) if len(f"{piece}.".splitlines()) > 1]] = True
    ends = line_ends.clone()
    for eos in (tokenizer.eos_token_id, getattr(model.lm.generation_config, "eos_token_id", None)):
        ends[[i for i in (eos if isinstance(eos, list) else [eos]) if i is not None and i < vocabulary]] = True
    return ends, line_ends
