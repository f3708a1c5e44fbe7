"""``qpeft convert``: write a data set in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DATA, SPLIT


def command(
    data: Annotated[str, typer.Argument(help=DATA)],
    output: Annotated[
        Path,
        typer.Argument(help="New folder (beir, msmarco, trec) or file (others; .gz is compressed)."),
    ],
    to: Annotated[str, typer.Option(help="beir, msmarco, trec, upr, rankllm, dpr or jsonl (training examples).")],
    split: Annotated[str | None, typer.Option(help=SPLIT)] = None,
    run: Annotated[Path | None, typer.Option(help="TREC run whose candidates replace those of the data set.")] = None,
    num_negatives: Annotated[int, typer.Option(help="Negatives per example that is made from qrels.")] = 11,
    seed: Annotated[int, typer.Option(help="Seed of the choice of those negatives.")] = 0,
) -> None:
    """Write a data set in another format.

    Parts that the format cannot store are counted and printed.

    Example: qpeft convert BEIR_FOLDER candidates.jsonl --to rankllm --run bm25.trec
    """
    from .. import formats
    from ..formats.convert import TARGETS, convert
    from ..formats.source import Source
    from ..utils.console import say
    from ..utils.files import expect_no_input

    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    expect_no_input(output, data, run)
    source = Source(formats.open_collection(data), split, formats.read_run(run) if run else None)
    done = convert(source, output, to, num_negatives=num_negatives, seed=seed)
    say(f"{done} ({output}, {to})")
