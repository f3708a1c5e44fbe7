"""``qpeft demo``: training, reranking and a report on this Python environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import expect_at_least


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="The LM: a folder, a Hub id, or 'packaged'.  [default: SmolLM2 if its wheel is there, or packaged]"
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="BEIR folder.  [default: made of your installed packages]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html and the adapters.")] = Path("demo"),
    queries: Annotated[
        int | None, typer.Option(help="Number of test queries.  [default: 1000; 100 with SmolLM2]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
) -> None:
    """Search in your own Python environment.

    The demo reranks with a frozen LM and adapters, compares, and writes a report.
    It takes SmolLM2 and a packaged adapter, or trains one on a small LM.
    """
    if queries is not None:
        expect_at_least(1, queries=queries)
    from ..demo import run

    run.main(model=model, data=data, output=output, queries=queries, seed=seed)
