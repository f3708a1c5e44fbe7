"""What several commands share: options, printing, and reading of a collection with its first stage."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from .. import formats
from ..formats.trec import Run

Device = Annotated[str | None, typer.Option(help="For example cuda or cpu.  [default: cuda if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="Of the LM: bfloat16, float16 or float32.  [default: as stored]")]
Attention = Annotated[
    str | None,
    typer.Option(help="Of the LM, one of transformers': sdpa, flash_attention_2, flex_attention, eager, …  [default: "
                      "sdpa where the LM has it]"),
]
IgnoreIdenticalIds = Annotated[
    bool, typer.Option("--ignore-identical-ids", help="Leave out documents with the id of their query, as in ArguAna.")
]
Measures = Annotated[
    list[str] | None,
    typer.Option(help="Names of ir_measures (nDCG@10 MAP RR@10) or trec_eval (map), one or several.  [default: nDCG@10 "
                      "RR@10 Success@{1,5,20}]"),
]
MEASURES = ("nDCG@10", "RR@10", "Success@1", "Success@5", "Success@20")


class Interrupted(Exception):
    """Ctrl-C, with what is left of the work in words."""


def is_first_process() -> bool:
    """False in all processes of torchrun but the first."""
    return os.environ.get("RANK", "0") == "0"


def say(message: object = "") -> None:
    """Print a line, or something of rich, on stdout; 100 columns wide where there is no terminal.

    Under torchrun the first process speaks for all.
    """
    if not is_first_process():
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False)
    console.print(message, soft_wrap=isinstance(message, str))


def spread_measures(arguments: list[str]) -> list[str]:
    """``--measures A B`` as ``--measures A --measures B``: what follows, up to the next option, and is a measure.

    Raises: ValueError for a word that is both a measure and a file, since either could be meant.
    """
    spread, asked = [], False
    for place, argument in enumerate(arguments):
        if argument.startswith("-"):
            asked = argument.partition("=")[0] == "--measures"
        elif asked and arguments[place - 1] != "--measures":
            from ..evaluation.measures import is_measure

            if is_measure(argument):
                if os.path.exists(argument):
                    raise ValueError(f"{argument} is a measure and also a file here; write ./{argument} for the file")
                spread.append("--measures")
        spread.append(argument)
    return spread


def measure_names(names: list[str] | None) -> list[str]:
    """One name per item, from options that may hold several; commas within brackets belong to a measure."""
    return [name for text in names or MEASURES for name in re.findall(r"(?:[^\s,()]|\([^()]*\))+|[()]", text)]


def asked_queries(data: formats.Collection, split: str | None) -> dict[str, str]:
    """The queries of a split: where it has qrels, those that are judged; else all."""
    if split is not None:
        data.choose_split(split)
    queries = data.queries(split)
    if data.format in ("upr", "dpr questions", "dpr folder") or not data.has("qrels", split):
        return queries
    judged = {query_id: queries[query_id] for query_id in data.qrels(split) if query_id in queries}
    if not judged:
        raise ValueError(f"{data.place}: no query of the qrels is among the queries; the files do not belong together")
    return judged


def first_stage(
    data: formats.Collection, split: str | None, queries: dict[str, str], run: Path | None, k: int,
    ignore_identical_ids: bool = False,
) -> tuple[Run, str]:
    """The candidates, at most ``k`` per query, and what to call them: ``run``, else the collection's own, else
    BM25.

    ignore_identical_ids: documents with the id of their query are left out before the cut.
    """
    searched = run is None and not data.has("candidates", split)
    if searched:
        from ..ranking.first_stage import bm25_run

        # one more than asked for, which may be the query itself
        whole, name = bm25_run(data.corpus, queries, k + ignore_identical_ids), "BM25"
    else:
        whole = formats.read_run(run) if run else data.candidates(split)
        name = system_name(run) if run else "candidates"
    if ignore_identical_ids:
        whole, identical = formats.without_identical_ids(whole)
        say_identical(name, identical)
    cut = {query_id: candidates[:k] for query_id, candidates in whole.items()}
    left_out = sum(len(candidates) for candidates in whole.values()) - sum(map(len, cut.values()))
    if left_out and not searched:
        say(f"{run or data.place}: {left_out} candidates beyond the {k} best of their query are left out")
    return cut, name


def say_identical(name: str, count: int) -> None:
    say(f"{name}: {count} candidates with the id of their query are left out")


def system_name(path: Path) -> str:
    """A short name for a run file: its name without what says the format."""
    name = path.name.removesuffix(".gz")
    for ending in (".trec", ".txt", ".run", ".tsv"):
        name = name.removesuffix(ending) or name
    return name
