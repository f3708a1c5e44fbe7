"""``qpeft convert``: write a data set in another format."""

from __future__ import annotations

from collections.abc import Mapping
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
    num_negatives: Annotated[
        int | None, typer.Option(help="Negatives per example that is made from qrels.  [default: 11]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of those negatives.  [default: 0]")] = None,
) -> None:
    """Write a data set in another format.

    Parts that the format cannot store are counted and printed.

    Example: qpeft convert BEIR_FOLDER candidates.jsonl --to rankllm --run bm25.trec
    """
    from .. import formats
    from ..formats.convert import OF_EXAMPLES, TARGETS, convert
    from ..formats.source import Source
    from ..utils.console import say
    from ..utils.files import expect_no_input

    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    expect_no_input(output, data, run)
    given = {"num_negatives": num_negatives, "seed": seed}
    drawing = {name: value for name, value in given.items() if value is not None}
    if drawing and to not in OF_EXAMPLES:
        _refuse(drawing, f"--to {' and '.join(OF_EXAMPLES)}, and does nothing with {to}")
    source = Source(formats.open_collection(data), split, formats.read_run(run) if run else None)
    if to in OF_EXAMPLES and source.data.has("examples", source.split):
        _refuse(drawing | ({"run": run} if run else {}), f"data with qrels, and {data} has training examples")
    done = convert(source, output, to, **drawing)
    say(f"{done} ({output}, {to})")


def _refuse(options: Mapping[str, object], what: str) -> None:
    """Raises: ValueError for the first of options that were given and would do nothing; ``what`` they are for."""
    for name in options:
        raise ValueError(f"--{name.replace('_', '-')} is of {what}; leave it out")
