"""``qpeft demo``: the whole job on this Python environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str | None, typer.Option(help="Base LM.  [default: the small one that comes along]")] = None,
    data: Annotated[Path | None, typer.Option(help="BEIR folder.  [default: harvested from your packages]")] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html and the adapters.")] = Path("demo"),
    queries: Annotated[int, typer.Option(help="How many test queries.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of training and sampling.")] = 0,
) -> None:
    """Search in your own Python environment: train adapters, rerank, compare, write a report."""
    if queries < 1:
        raise ValueError(f"--queries must be at least 1, got {queries}")
    from ..demo import run

    run.main(model=model, data=data, output=output, queries=queries, seed=seed)
