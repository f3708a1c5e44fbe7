"""``qpeft evaluate``: measures of runs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Measures


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="TREC runs; the first one is the baseline.")],
    qrels: Annotated[Path, typer.Option(help="Qrels: TREC, or a BEIR tsv; plain or .gz.")],
    measures: Measures = None,
    test: Annotated[str, typer.Option(help="Paired test: t-test or permutation.")] = "t-test",
    ignore_identical_ids: Annotated[
        bool, typer.Option("--ignore-identical-ids", help="Leave out documents with the id of their query.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON too.")] = None,
) -> None:
    """Evaluate runs and compare each with the first: difference and p-value of a paired test, query by query.

    A query that a run does not hold counts as 0. Example: qpeft evaluate --qrels test.tsv bm25.trec mine.trec
    --measures nDCG@10 RR@10
    """
    from .. import formats
    from ..evaluate import compare_table
    from ..formats.io import write_text
    from .common import measure_names, say, system_name

    paths, names = _runs_and_measures(runs, measures)
    labels = [system_name(path) for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    if len(set(labels)) < len(labels):
        raise ValueError("each run can be given once only")
    judged = formats.read_qrels(qrels)
    table = compare_table(
        {label: formats.read_run(path) for label, path in zip(labels, paths, strict=True)}, judged,
        measure_names(names), test=test, ignore_identical_ids=ignore_identical_ids,
    )
    if output:
        write_text(output, json.dumps(table.to_dict(), indent=2) + "\n")
    say(table.render())


def _runs_and_measures(arguments: list[str], measures: list[str] | None) -> tuple[list[Path], list[str] | None]:
    """``--measures A B`` gives B to the arguments: whatever is no file but looks like a measure is one."""
    paths, extra = [], []
    for argument in arguments:
        (extra if measures and "@" in argument and not Path(argument).exists() else paths).append(argument)
    if not paths:
        raise ValueError("expected at least one run file")
    return [Path(path) for path in paths], [*measures, *extra] if measures else None
