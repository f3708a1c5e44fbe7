"""Groups of documents and of pairs that share a pass, by their lengths: those that take the least time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

from ..prompts.pairs import PairBatch

READ_TOKENS_PER_TOKEN = 8  # prefix tokens that are read from a cache in the memory of one that is computed
READ_TOKENS_IN_TIME = 16  # the same in its time: 7 to 57 with a Llama of 2 M parameters, 23 to 158 with one of 135 M


def prefix_groups(batch: PairBatch, max_tokens: int, pass_tokens: int) -> Iterator[list[int]]:
    """Group the documents of the pairs by length: at most ``max_tokens`` padded tokens, but at least one document.

    Args:
        batch: the pairs.
        max_tokens: token budget of a group.
        pass_tokens: what another group costs, in tokens (`tokens_worth_a_pass`).
    """
    documents = {d for _, d in batch.pairs}
    items = [_Item(d, len(batch.documents[d].ids)) for d in documents]
    yield from _groups(items, max_tokens, None, pass_tokens)


def suffix_groups(
    batch: PairBatch,
    documents: list[int],
    max_tokens: int,
    max_pairs: int | None,
    pass_tokens: int,
    shared: bool,
    clue_per_token: bool,
    step: int = 1,
) -> Iterator[list[int]]:
    """Group the pairs of documents by length, for suffix passes.

    A pair counts with the tokens of its query and its instruction, and an eighth of the longest prefix in its group
    where this is only read; otherwise with its whole prompt.

    Args:
        batch: the pairs.
        documents: those whose pairs are grouped.
        max_tokens, max_pairs: what a group has at most, but at least one pair.
        pass_tokens: what another group costs, in tokens (`tokens_worth_a_pass`).
        shared: whether the documents have been read before.
        clue_per_token: whether each query token brings a clue.
        step: groups have multiples of so many pairs where they can.
    """
    wanted, factor = set(documents), 2 if clue_per_token else 1

    def item(i: int) -> _Item:
        q, d = batch.pairs[i]
        suffix, prefix = factor * len(batch.queries[q]) + batch.instruction_length(q), len(batch.documents[d].ids)
        return _Item(i, suffix, prefix) if shared else _Item(i, suffix + prefix)

    items = [item(i) for i, (_, d) in enumerate(batch.pairs) if d in wanted]
    yield from _groups(items, max_tokens, max_pairs, pass_tokens, step)


def generation_groups(lengths: Sequence[int], new_tokens: int, max_tokens: int) -> Iterator[list[int]]:
    """Group prompts that an LM continues: at most ``max_tokens`` in a group, but at least one prompt.

    Another group costs as many steps as there are new tokens, so there are as few as the budget allows.

    Args:
        lengths: tokens of each prompt.
        new_tokens: tokens that each prompt is continued with.
        max_tokens: token budget of a group, new tokens included.
    """
    items = [_Item(i, length + new_tokens) for i, length in enumerate(lengths)]
    yield from _groups(items, max_tokens, None, sum(lengths) + max_tokens * len(lengths))


class _Item(NamedTuple):
    """A document or a pair that is put into a group.

    place: its index.
    computed: tokens that are computed for it.
    read: tokens that are read for it from keys and values of its document.
    """

    place: int
    computed: int
    read: int = 0


def _groups(
    items: Sequence[_Item], max_tokens: int, max_items: int | None, pass_tokens: int, step: int = 1
) -> Iterator[list[int]]:
    """Group items so that the passes take the least time, long items first.

    A pass takes the time of ``pass_tokens`` tokens, and of those of its items, each padded to the longest one. Items
    are sorted by what is computed for them or by what is read, whichever gives the better groups.

    Args:
        items: of all groups.
        max_tokens, max_items: what a group has at most, but at least one item.
        pass_tokens: what another group costs.
        step: all groups but the last have a multiple of so many items, or fewer than that.
    """
    orders = [sorted(items, key=lambda item: (-item.computed, -item.read))]
    if any(item.read for item in items):
        orders.append(sorted(items, key=lambda item: (-item.read, -item.computed)))
    ways = [_best_borders(order, max_tokens, max_items, pass_tokens, step) for order in orders]
    (_, borders), order = min(zip(ways, orders, strict=True), key=lambda way: way[0][0])
    for start, end in pairwise(borders):
        yield [item.place for item in order[start:end]]


def _best_borders(
    order: Sequence[_Item], max_tokens: int, max_items: int | None, pass_tokens: int, step: int
) -> tuple[float, list[int]]:
    """Split items, in their order, into the groups that take the least time.

    The groups of all items are the last one and the best ones of those before it, so the best are found from the first
    item on (dynamic programming).

    Returns: the time in tokens; where groups begin, and where the last one ends.
    """
    least, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        best, best_start, computed, read = inf, end - 1, 0, 0
        for start in range(end - 1, -1, -1):
            count, computed, read = end - start, max(computed, order[start].computed), max(read, order[start].read)
            tokens = count * (computed + read // READ_TOKENS_PER_TOKEN)
            if count > 1 and (tokens > max_tokens or count > (max_items or count)):
                break
            if count % step and count > step and end < len(order):
                continue
            cost = least[start] + pass_tokens + count * (computed + read / READ_TOKENS_IN_TIME)
            if cost <= best:
                best, best_start = cost, start
        least.append(best)
        starts.append(best_start)
    borders = [len(order)]
    while borders[-1]:
        borders.append(starts[borders[-1]])
    return least[-1], borders[::-1]
