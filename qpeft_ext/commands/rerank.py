"""``qpeft rerank``: rerank a run with an adapter, and compare with what there was before."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype, Measures


def command(
    data: Annotated[Path, typer.Option(help="BEIR folder: corpus.jsonl, queries.jsonl, qrels/ (plain or .gz).")],
    output: Annotated[Path, typer.Option(help="TREC run to write; .gz by its name.")],
    model: Annotated[str | None, typer.Option(help="Adapter: a folder or a Hub id.")] = None,
    base_model: Annotated[str | None, typer.Option(help="LM.  [default: the one the adapter names]")] = None,
    run: Annotated[Path | None, typer.Option(help="TREC run of the first stage.  [default: BM25]")] = None,
    split: Annotated[str | None, typer.Option(help="Which qrels to use.  [default: test, if there]")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates per query.")] = 100,
    upr: Annotated[bool, typer.Option("--upr", help="Also rerank without clues (UPR), for comparison.")] = False,
    similarity_only: Annotated[
        bool, typer.Option("--similarity-only", help="Also rank by the clues' similarities alone, without the LM.")
    ] = False,
    measures: Measures = None,
    dtype: Dtype = None,
    device: Device = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Bit-equal scores; slower.")] = False,
    max_tokens_per_batch: Annotated[int | None, typer.Option(help="Token budget of a pass.")] = None,
    max_query_tokens: Annotated[
        int | None, typer.Option(help="A longer query is an error.  [default: the adapter's, or 64]")
    ] = None,
    max_document_tokens: Annotated[
        int | None, typer.Option(help="A longer document is cut.  [default: the adapter's, or 256]")
    ] = None,
) -> None:
    """Rerank the candidates of a first stage.

    --output is the ranking of the adapter. Without --model it is that of --upr, else that of --similarity-only, and
    --base-model says which LM. If the folder has qrels, a table shows the measures before and after.
    """
    from .. import formats
    from ..evaluate import compare_table, parse_measures
    from ..formats import beir
    from ..rerank_run import by_likelihood, by_similarity, check_candidates, rerank_run
    from .common import first_stage, measure_names, read_split, say

    if not (model or upr or similarity_only):
        raise ValueError("expected --model ADAPTER, or --base-model LM with --upr or --similarity-only")
    if not (model or base_model):
        raise ValueError("expected --base-model LM, since there is no adapter that names one")
    for option, value in (("--top-k", top_k), ("--max-query-tokens", max_query_tokens),
                          ("--max-document-tokens", max_document_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    split, qrels = read_split(data, split)
    names = measure_names(measures)
    if qrels:
        parse_measures(names)
    corpus, queries = formats.Corpus(data), beir.read_queries(data)
    asked = {query_id: queries[query_id] for query_id in qrels if query_id in queries} if qrels else queries
    candidates, before = first_stage(corpus, asked, run, top_k)
    check_candidates(candidates, queries, corpus, run)

    with formats.RunWriter(output) as writer:  # opened before the LM is loaded: a bad --output is known at once
        rerankers = _load(model, base_model, upr, similarity_only, dtype, device, deterministic, max_tokens_per_batch)
        for _, reranker in rerankers:
            prompt = reranker.model.prompt
            prompt.max_query_tokens = max_query_tokens or prompt.max_query_tokens
            prompt.max_document_tokens = max_document_tokens or prompt.max_document_tokens
        _check_queries(rerankers[0][1], {query_id: queries[query_id] for query_id in candidates})
        runs, lines = {before: candidates}, []
        for place, (name, reranker) in enumerate(rerankers):
            rank = by_similarity(reranker) if name == "similarity only" else by_likelihood(reranker)
            result = rerank_run(rank, queries, corpus, candidates, name=name, writer=None if place else writer)
            cut = f"; {reranker.truncated} documents cut to max_document_tokens" if reranker.truncated else ""
            lines.append(f"{name}: {result}{cut}")
            runs[name] = result.run
    for line in lines:
        say(line)
    say(f"wrote {writer.num_lines} lines to {output}")
    if qrels:
        say(compare_table(runs, qrels, names).render())
    else:
        say(f"{data} has no qrels/test.tsv, so nothing is evaluated; name another --split if there is one")


def _load(model, base_model, upr, similarity_only, dtype, device, deterministic, max_tokens_per_batch) -> list[tuple]:
    """The systems asked for, by name; the one whose run is written first. They share one LM."""
    from .common import default_device, quiet_transformers

    device = default_device(device)
    quiet_transformers()
    from .. import QPeftConfig, Reranker, get_qpeft_model, load_lm

    options = {"deterministic": deterministic}
    if max_tokens_per_batch is not None:
        options["max_tokens_per_batch"] = max_tokens_per_batch
    rerankers = []
    if model:
        adapter = Reranker.from_pretrained(model, base_model, device=device, dtype=dtype, **options)
        rerankers.append((_method(adapter.model.qpeft_config.clues), adapter))
        lm, tokenizer, config = adapter.model.lm, adapter.model.tokenizer, adapter.model.qpeft_config
    else:
        lm, tokenizer, config = load_lm(base_model, dtype=dtype, device=device), None, QPeftConfig()
    if upr or similarity_only:  # the adapter's prompt and limits, so that only the clues differ
        same = {name: getattr(config, name) for name in ("instruction", "max_document_tokens", "max_query_tokens", "k")}
        plain = get_qpeft_model(lm, QPeftConfig(clues="none", **same), tokenizer)
        rerankers += [("UPR", Reranker(plain, **options))] * upr
        rerankers += [("similarity only", Reranker(plain, **options))] * similarity_only
    return rerankers


def _method(clues: str) -> str:
    return {"top_k": "Q-PEFT-R", "attention": "Q-PEFT-A"}.get(clues, "UPR adapter")


def _check_queries(reranker, queries: dict[str, str]) -> None:
    """Tokenise all queries first: one that is too long is an error now, not after an hour."""
    for query_id, text in queries.items():
        try:
            reranker.model.prompt.queries([text])
        except ValueError as error:
            raise ValueError(f"query {query_id!r}: {error}") from None
