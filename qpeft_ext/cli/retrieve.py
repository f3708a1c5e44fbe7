"""``qpeft retrieve``: the first stage, BM25, as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DATA, RUN_OUTPUT, SPLIT, IgnoreIdenticalIds, Measures, expect_at_least, measure_names


def command(
    data: Annotated[str, typer.Option(help=DATA)],
    output: Annotated[Path, typer.Option(help=RUN_OUTPUT)],
    split: Annotated[str | None, typer.Option(help=SPLIT)] = None,
    top_k: Annotated[int, typer.Option(help="Candidates per query.")] = 100,
    ignore_identical_ids: IgnoreIdenticalIds = False,
    k1: Annotated[float, typer.Option(help="Parameter k1 of BM25, 0 or more: how much repeated words count.")] = 0.9,
    b: Annotated[float, typer.Option(help="Parameter b of BM25, 0 to 1: how much long documents lose.")] = 0.4,
    measures: Measures = None,
) -> None:
    """Retrieve candidates with BM25, and evaluate them.

    They are evaluated if the data set has judgements. The index is built once and kept.

    Example: qpeft retrieve --data FOLDER --top-k 1000 --output bm25.trec.gz
    """
    from .. import formats
    from ..evaluation.comparison import compare_table
    from ..evaluation.measures import parse_measures
    from ..formats.trec import check_id
    from ..ranking.first_stage import BM25, asked_queries, say_identical
    from ..utils.console import say
    from ..utils.files import expect_no_input
    from ..utils.words import counted

    expect_at_least(1, top_k=top_k)
    expect_no_input(output, data)
    collection = formats.open_collection(data)
    names = measure_names(measures)
    judges = {"qrels", "answers"} & set(collection.parts)
    if judges:
        parse_measures(names)
    queries = asked_queries(collection, split)
    for query_id in queries:
        check_id(f"{data}: query_id", query_id)
    with formats.RunWriter(output) as writer:  # opened first, so that a bad --output is an error before the work
        index = BM25(collection.corpus, k1=k1, b=b)
        # one more candidate, since one of them may be the query itself
        run = {query_id: index.search(text, top_k + ignore_identical_ids) for query_id, text in queries.items()}
        if ignore_identical_ids:
            whole, identical = formats.without_identical_ids(run)
            run = {query_id: ranking[:top_k] for query_id, ranking in whole.items()}
            say_identical("BM25", identical)
        for query_id, ranking in run.items():
            writer.add(query_id, ranking)
    say(
        f"BM25 (k1 {index.k1:g}, b {index.b:g}) over {counted(len(index.doc_ids), 'documents')}: wrote "
        f"{counted(writer.num_lines, 'lines')} for {counted(len(queries), 'queries')} to {output}"
    )
    if without := sum(not ranking for ranking in run.values()):
        words = "queries have no candidate: no document holds a word of theirs"
        say(counted(without, words, "query has no candidate: no document holds a word of it"))
    qrels = collection.judge(split, [run]) if judges else None
    if qrels:
        say(compare_table({"BM25": run}, qrels, names).render())
