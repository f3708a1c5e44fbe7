"""``qpeft convert``: a collection in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    data: Annotated[str, typer.Argument(help="Collection: a folder or file of any format, or an id (see README).")],
    output: Annotated[Path, typer.Argument(help="New folder (beir, msmarco, trec) or file (the others; .gz by name).")],
    to: Annotated[str, typer.Option(help="beir, msmarco, trec, upr, rankllm, dpr or jsonl (training examples).")],
    split: Annotated[str | None, typer.Option(help="Which split.  [default: test, or the only one]")] = None,
    run: Annotated[Path | None, typer.Option(help="TREC run: the candidates, instead of the collection's.")] = None,
    num_negatives: Annotated[int, typer.Option(help="Per training example, where they are made here.")] = 11,
    seed: Annotated[int, typer.Option(help="Of those negatives.")] = 0,
) -> None:
    """Write a collection in another format: all that it can hold, with a count of what it cannot.

    Example: qpeft convert BEIR_FOLDER candidates.jsonl --to rankllm --run bm25.trec
    """
    from .. import formats
    from ..formats.convert import TARGETS, convert
    from ..formats.source import Source
    from ..utils.console import say

    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    source = Source(formats.open_collection(data), split, formats.read_run(run) if run else None)
    done = convert(source, output, to, num_negatives=num_negatives, seed=seed)
    say(f"{done} ({output}, {to})")
