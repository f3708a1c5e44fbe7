"""``qpeft evaluate``: measures of runs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import Measures


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="TREC runs; the first one is the baseline.")],
    qrels: Annotated[
        str, typer.Option(help="Qrels (TREC, BEIR tsv, MS MARCO), or a collection that judges: a folder with --split, "
                               "retriever output or questions with answers, an id of ir_datasets.")
    ],
    split: Annotated[str | None, typer.Option(help="Of a collection.  [default: test, or the only one]")] = None,
    measures: Measures = None,
    test: Annotated[str, typer.Option(help="Paired test: t-test or permutation.")] = "t-test",
    ignore_identical_ids: Annotated[
        bool, typer.Option("--ignore-identical-ids", help="Leave out documents with the id of their query.")
    ] = False,
    ties: Annotated[str, typer.Option(help="Equal scores: order (as in the file) or trec_eval (by id).")] = "order",
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON too.")] = None,
) -> None:
    """Evaluate runs and compare each with the first: difference and p-value of a paired test, query by query.

    A query that a run does not hold counts as 0, a document without a judgement as not relevant. With several runs the
    p-values are Holm-corrected. Example: qpeft evaluate --qrels test.tsv bm25.trec mine.trec
    --measures nDCG@10 RR@10
    """
    from .. import formats
    from ..evaluate import compare_table, parse_measures
    from ..utils.files import write_text
    from .common import measure_names, say, system_name

    paths, names = _runs_and_measures(runs, measures)
    labels = [system_name(path) for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    if len(set(labels)) < len(labels):
        raise ValueError("each run can be given once only")
    parse_measures(measure_names(names))
    read = {label: formats.read_run(path) for label, path in zip(labels, paths, strict=True)}
    table = compare_table(read, formats.read_judgements(qrels, split, list(read.values())), measure_names(names),
                          test=test, ignore_identical_ids=ignore_identical_ids, ties=ties)
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
