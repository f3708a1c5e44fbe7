"""Checks of what `Reranker` is called with: lists of queries and candidates, and arguments of `CrossEncoder`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
import torch

from ..prompts.prompt import Document, as_documents, expect_query
from ..utils.inputs import as_list, kind_of
from ..utils.words import counted, did_you_mean


def expect_options(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check names of options before minutes of loading.

    Args:
        what: the function that is called, for messages.
        given: the names.
        known: those that there are.
    Raises: TypeError for an unknown one.
    """
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known) or "; what load_lm shall get goes into lm_kwargs"
            raise TypeError(f"{what}: there is no option {name!r}{hint}")


def as_lists(
    what: str, queries: Iterable[str], candidates: Iterable[Iterable[Document]]
) -> tuple[list[str], list[list[Document]]]:
    """Read queries and the documents of each once, and check them.

    Args:
        what: the method that is called, for messages.
        queries, candidates: as for `Reranker.rank_many`.
    Raises: TypeError or ValueError that names the query or the document.
    """
    queries = as_list(queries, f"{what}: queries", "one query goes into a list: [query]")
    lists = as_list(candidates, f"{what}: candidates", "give a list of documents for each query")
    if len(queries) != len(lists):
        raise ValueError(f"{what}: {counted(len(queries), 'queries')} but {counted(len(lists), 'lists')} of candidates")
    for i, query in enumerate(queries):
        expect_query(query, f"query {i}")
    return queries, [
        as_documents(documents, f"{what}: the candidates of query {i}", f" of query {i}")
        for i, documents in enumerate(lists)
    ]


def as_instructions(what: str, instruction: str | Sequence[str | None] | None, count: int) -> list[str | None] | None:
    """Read an instruction for all, or one for each; the prompt checks the texts.

    Args:
        what: the method that is called, for messages.
        instruction: a string, a list with a string or None for each, or None.
        count: how many there must be in a list.
    Returns: one for each; None where there is none at all.
    Raises: TypeError or ValueError for a list of another kind or length.
    """
    if instruction is None or isinstance(instruction, str):
        return None if instruction is None else [instruction] * count
    given = as_list(instruction, f"{what}: instruction", "one instruction for all is a string")
    if len(given) != count:
        raise ValueError(f"{what}: instruction must be a string, or a list of {count}, got {len(given)}")
    return given


def as_threshold(what: str, threshold: float | None) -> float | None:
    """Check a threshold of relevance.

    Args:
        what: the method that is called, for messages.
        threshold: what a user gave.
    Raises: TypeError for anything but a number or None; ValueError for one outside of [0, 1].
    """
    if threshold is None:
        return None
    if not isinstance(threshold, (int, float, np.floating)) or isinstance(threshold, bool):
        raise TypeError(f"{what}: threshold must be a number in [0, 1], got {kind_of(threshold)}")
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"{what}: threshold must be in [0, 1], got {threshold}; it is of relevances, and scores are in nats"
        )
    return float(threshold)


def expect_neutral(
    what: str, activation_fn: object, apply_softmax: object, num_workers: object, prompt_name: object
) -> None:
    """Refuse values of `CrossEncoder`'s arguments that our scores have no use for.

    Args:
        what: the method that is called, for messages.
        activation_fn, apply_softmax, num_workers, prompt_name: its arguments.
    Raises: ValueError that names the argument.
    """
    if activation_fn is not None and not isinstance(activation_fn, torch.nn.Identity):
        raise ValueError(
            f"{what}: a score is given without an activation; leave activation_fn out and apply yours to the scores"
        )
    if apply_softmax:
        raise ValueError(f"{what}: there is one score a pair and no classes; leave apply_softmax out")
    if num_workers:
        raise ValueError(f"{what}: texts are tokenised in this process; leave num_workers out")
    if prompt_name is not None:
        raise ValueError(
            f"{what}: the adapter has no prompts by name; leave prompt_name out, or give the text as instruction"
        )
