"""``qpeft evaluate``: measures of runs, side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .common import SPLIT, IgnoreIdenticalIds, Measures, measure_names


def command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="TREC runs; the first one is the baseline.")],
    qrels: Annotated[
        str,
        typer.Option(
            help="Qrels (TREC, BEIR tsv, MS MARCO), or a data set with judgements: a folder with --split, retriever "
            "output or questions with answers, an id of ir_datasets."
        ),
    ],
    split: Annotated[str | None, typer.Option(help=SPLIT)] = None,
    measures: Measures = None,
    test: Annotated[str, typer.Option(help="Paired test of significance: t-test or permutation.")] = "t-test",
    ignore_identical_ids: IgnoreIdenticalIds = False,
    ties: Annotated[
        str, typer.Option(help="Equal scores are ordered as in the file (order) or by id (trec_eval).")
    ] = "order",
    output: Annotated[Path | None, typer.Option(help="File for the table as JSON.")] = None,
) -> None:
    """Evaluate runs, and compare each with the first.

    The comparison is a paired test over the queries. A query that is missing in a run counts as 0, and a document
    without a judgement as not relevant. With several runs the p-values are Holm-corrected.

    Example: qpeft evaluate --qrels test.tsv bm25.trec mine.trec --measures nDCG@10 RR@10
    """
    from .. import formats
    from ..evaluation.comparison import compare_table
    from ..evaluation.measures import parse_measures
    from ..formats.trec import system_name
    from ..utils.console import say
    from ..utils.files import expect_no_input
    from ..utils.partial_file import ResultWriter

    names = measure_names(measures)
    parse_measures(names)
    for run in runs:
        _check_run(run, measures)
    expect_no_input(output, qrels, *runs)
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
        with ResultWriter(output) as file:
            file.write(json.dumps(table.to_dict(), indent=2).encode() + b"\n")
    say(table.render())


def _check_run(path: str, measures: list[str] | None) -> None:
    """Raises: ValueError for a word that is no file, but a measure or nearly one."""
    from ..evaluation.measures import closest_measure, is_measure

    if os.path.exists(path):
        return
    if is_measure(path):
        raise ValueError(f"{path} is a measure and no file; name it directly after --measures")
    if measures and path.partition("@")[0].isidentifier() and (closest := closest_measure(path)):
        raise ValueError(f"{path} is neither a run file nor a measure; did you mean {closest}?")
