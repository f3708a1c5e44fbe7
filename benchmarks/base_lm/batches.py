"""Batches of both stages. They depend on recipe and step only, so a resumed run sees those of an unbroken one."""

from __future__ import annotations

import numpy as np
import torch
from data import TokenisedTexts, hints, prompt_rows, pseudo_query
from recipe import Recipe


def copy_batch(recipe: Recipe, step: int) -> torch.Tensor:
    """``p p`` with 6 to 20 ids, [B, 2 L]; Zipf-distributed over the vocabulary, which is sorted by frequency."""
    rng = np.random.default_rng([recipe.seed, 1, step])
    length, count = int(rng.integers(6, 21)), min(recipe.vocabulary, recipe.copy_ids) - 1
    zipf = 1 / np.arange(1, count + 1)
    ids = 1 + rng.choice(count, (recipe.copy_batch, length), p=zipf / zipf.sum())
    return torch.from_numpy(np.concatenate([ids, ids], axis=1))


def query_batches(recipe: Recipe, texts: TokenisedTexts, group: int, decaying: bool) -> list[list]:
    """Eight batches of about equal row lengths each, in random order."""
    rng = np.random.default_rng([recipe.seed, 2, group])
    has_sentence = np.diff(texts.first_sentence) > 0
    is_passage = np.arange(len(texts.documents)) >= texts.first_passage
    pools = {
        (passage, documented): np.flatnonzero((is_passage == passage) & (has_sentence == documented))
        for passage in (False, True)
        for documented in (False, True)
    }
    rows = []
    for _ in range(8 * recipe.batch):
        passage = recipe.passages > 0 and rng.random() < recipe.passages
        is_documented = rng.random() < (recipe.asked if passage else 0.95 if decaying else recipe.documented)
        index = int(rng.choice(pools[passage, is_documented]))
        document = texts.documents[index]
        queries = []
        if is_documented:
            first, stop = texts.first_sentence[index], texts.first_sentence[index + 1]
            if passage:  # its questions are equals; of a docstring the first sentence is the one that matters
                first = int(rng.integers(first, stop))
            queries.append((texts.sentences[first], False))
            if rng.random() < 0.5:
                queries.append((texts.sentences[first], True))
            if stop > first + 1 and rng.random() < 0.7:
                queries.append((texts.sentences[int(rng.integers(first + 1, stop))], rng.random() < 1 / 3))
        for _ in range(2 if is_documented else 3):
            queries.append((pseudo_query(document, texts, rng), rng.random() < 1 / 3))
        with_hints = [(query, hints(document, query, texts, rng) if hinted else None) for query, hinted in queries]
        rows.append(prompt_rows(document, with_hints, texts.prompt))
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[start : start + recipe.batch] for start in range(0, len(rows), recipe.batch)]
    return [batches[position] for position in rng.permutation(len(batches))]
