"""``qpeft demo``: training, reranking and a report on this Python environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import expect_at_least


def command(
    model: Annotated[str | None, typer.Option(help="The LM: a folder or a Hub id.  [default: a small one]")] = None,
    data: Annotated[Path | None, typer.Option(help="BEIR folder.  [default: made of your installed packages]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html and the adapters.")] = Path("demo"),
    queries: Annotated[int, typer.Option(help="Number of test queries.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of training and sampling.")] = 0,
) -> None:
    """Search in your own Python environment.

    The demo trains adapters, reranks, compares, and writes a report.
    """
    expect_at_least(1, queries=queries)
    from ..demo import run

    run.main(model=model, data=data, output=output, queries=queries, seed=seed)
