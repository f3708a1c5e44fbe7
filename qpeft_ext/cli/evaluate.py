"""``qpeft evaluate``: measures of runs, side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .common import IgnoreIdenticalIds, Measures


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="TREC runs; the first one is the baseline.")],
    qrels: Annotated[
        str,
        typer.Option(
            help="Qrels (TREC, BEIR tsv, MS MARCO), or a collection that judges: a folder with --split, "
            "retriever output or questions with answers, an id of ir_datasets."
        ),
    ],
    split: Annotated[str | None, typer.Option(help="Of a collection.  [default: test, or the only one]")] = None,
    measures: Measures = None,
    test: Annotated[str, typer.Option(help="Paired test: t-test or permutation.")] = "t-test",
    ignore_identical_ids: IgnoreIdenticalIds = False,
    ties: Annotated[str, typer.Option(help="Equal scores: order (as in the file) or trec_eval (by id).")] = "order",
    output: Annotated[Path | None, typer.Option(help="Write the table as JSON too.")] = None,
) -> None:
    """Evaluate runs and compare each with the first: difference and p-value of a paired test, query by query.

    A query that a run does not hold counts as 0, a document without a judgement as not relevant. With several runs the
    p-values are Holm-corrected. Example: qpeft evaluate --qrels test.tsv bm25.trec mine.trec
    --measures nDCG@10 RR@10
    """
    from .. import formats
    from ..evaluation.comparison import compare_table
    from ..evaluation.measures import parse_measures
    from ..ranking.run import system_name
    from ..utils.console import say
    from ..utils.files import write_text
    from .common import measure_names

    names = measure_names(measures)
    parse_measures(names)
    for run in runs:
        _check_run(run, measures)
    paths = [Path(run) for run in runs]
    labels = [system_name(path) for path in paths]
    if len(set(labels)) < len(labels):
        labels = [str(path) for path in paths]
    if len(set(labels)) < len(labels):
        raise ValueError("each run can be given once only")
    read = {label: formats.read_run(path) for label, path in zip(labels, paths, strict=True)}
    table = compare_table(
        read,
        formats.read_judgements(qrels, split, list(read.values())),
        names,
        test=test,
        ignore_identical_ids=ignore_identical_ids,
        ties=ties,
    )
    if output:
        write_text(output, json.dumps(table.to_dict(), indent=2) + "\n")
    say(table.render())


def _check_run(path: str, measures: list[str] | None) -> None:
    """Raises: ValueError for a word that is no file but is, or is nearly, a measure."""
    from ..evaluation.measures import closest_measure, is_measure

    if os.path.exists(path):
        return
    if is_measure(path):
        raise ValueError(f"{path} is a measure and no file; name it directly after --measures")
    if measures and path.partition("@")[0].isidentifier() and (closest := closest_measure(path)):
        raise ValueError(f"{path} is neither a run file nor a measure; did you mean {closest}?")
