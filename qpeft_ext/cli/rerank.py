"""``qpeft rerank``: rerank a run with an adapter, and compare with what there was before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .common import Attention, Device, Dtype, IgnoreIdenticalIds, Measures


def command(
    data: Annotated[str, typer.Option(help="Collection: a folder or file of any format, or an id (see README).")],
    output: Annotated[Path, typer.Option(help="TREC run to write; .gz by its name.")],
    model: Annotated[str | None, typer.Option(help="Adapter: a folder or a Hub id.")] = None,
    base_model: Annotated[str | None, typer.Option(help="LM.  [default: the one the adapter names]")] = None,
    run: Annotated[
        Path | None, typer.Option(help="TREC run of the first stage.  [default: the data's candidates, else BM25]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Whose queries.  [default: test, or the only one]")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates per query.")] = 100,
    ignore_identical_ids: IgnoreIdenticalIds = False,
    upr: Annotated[bool, typer.Option("--upr", help="Also rerank without clues (UPR), for comparison.")] = False,
    similarity_only: Annotated[
        bool, typer.Option("--similarity-only", help="Also rank by the clues' similarities alone, without the LM.")
    ] = False,
    measures: Measures = None,
    dtype: Dtype = None,
    attention: Attention = None,
    device: Device = None,
    devices: Annotated[
        str | None, typer.Option(help="One process with its own model for each, such as cuda:0,cuda:1 or cpu,cpu.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: one Ray actor for each of --devices.")] = "local",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with OUTPUT.part, which the same job left when it was interrupted; or start over.",
        ),
    ] = True,
    cache_bytes: Annotated[
        int, typer.Option(help="Memory per device for documents' prefixes, kept from query to query.")
    ] = 0,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Bytes per device besides the weights, or free (CUDA): gives token budget and "
            "caches, instead of --cache-bytes."
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(help="Folder made by qpeft index: documents' prefixes are read from there.")
    ] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Bit-equal scores; slower.")] = False,
    max_tokens_per_batch: Annotated[int | None, typer.Option(help="Token budget of a pass.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Prompt of --upr without an adapter: qpeft, or upr as published.  [default: the adapter's, or qpeft]"
        ),
    ] = None,
    max_query_tokens: Annotated[
        int | None, typer.Option(help="A longer query is an error.  [default: the adapter's, or 64]")
    ] = None,
    truncate_queries: Annotated[
        bool, typer.Option("--truncate-queries", help="Cut longer queries at their end, instead of the error.")
    ] = False,
    max_document_tokens: Annotated[
        int | None, typer.Option(help="A longer document is cut.  [default: the adapter's, or 256]")
    ] = None,
) -> None:
    """Rerank the candidates of a first stage.

    --output is the ranking of the adapter. Without --model it is that of --upr, else that of --similarity-only, and
    --base-model says which LM. If the collection judges, a table shows the measures before and after.
    """
    from .. import formats
    from ..evaluation.comparison import compare_table
    from ..evaluation.measures import parse_measures
    from ..ranking.first_stage import asked_queries, first_stage
    from ..ranking.job import rerank_job
    from ..ranking.run import check_candidates
    from ..ranking.systems import SystemsSpec
    from ..utils.console import say
    from .common import measure_names

    if not (model or upr or similarity_only):
        raise ValueError("expected --model ADAPTER, or --base-model LM with --upr or --similarity-only")
    if not (model or base_model):
        raise ValueError("expected --base-model LM, since there is no adapter that names one")
    for option, value, least in (
        ("--top-k", top_k, 1),
        ("--max-query-tokens", max_query_tokens, 1),
        ("--max-document-tokens", max_document_tokens, 1),
        ("--cache-bytes", cache_bytes, 0),
        ("--max-tokens-per-batch", max_tokens_per_batch, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option} must be at least {least}, got {value}")
    if max_memory is not None and (cache_bytes or not (max_memory == "free" or max_memory.isdigit())):
        raise ValueError(
            "--max-memory and --cache-bytes exclude each other"
            if cache_bytes
            else f"--max-memory must be a number of bytes or free, got {max_memory!r}"
        )
    places = _devices(device, devices, engine)
    collection = formats.open_collection(data)
    corpus, asked, queries = collection.corpus, asked_queries(collection, split), collection.queries(split)
    names = measure_names(measures)
    if {"qrels", "answers"} & set(collection.parts):
        parse_measures(names)
    candidates, before = first_stage(collection, split, asked, run, top_k, ignore_identical_ids)
    check_candidates(candidates, queries, corpus, run)
    qrels = collection.judge(split, [candidates])
    spec = SystemsSpec(
        data=os.path.abspath(data) if os.path.exists(data) else data,
        model=model,
        base_model=base_model,
        upr=upr,
        similarity_only=similarity_only,
        dtype=dtype,
        attention=attention,
        deterministic=deterministic,
        max_tokens_per_batch=max_tokens_per_batch,
        max_query_tokens=max_query_tokens,
        truncate_queries=truncate_queries,
        max_document_tokens=max_document_tokens,
        cache_bytes=cache_bytes,
        max_memory=int(max_memory) if max_memory and max_memory.isdigit() else max_memory,
        index=index.absolute() if index else None,
        template=template,
    )
    results = rerank_job(spec, queries, candidates, output, engine=engine, devices=places, resume=resume)
    for name, result in results.items():
        say(f"{name}: {result}")
    say(f"wrote {sum(map(len, results[spec.names[0]].run.values()))} lines to {output}")
    if qrels:
        runs = {before: candidates} | {name: result.run for name, result in results.items()}
        say(compare_table(runs, qrels, names).render())
    else:
        splits = ", ".join(collection.splits) or "none"
        say(f"{data} has no judgements for these queries, so nothing is evaluated; its splits: {splits}")


def _devices(device: str | None, devices: str | None, engine: str) -> list[str | None]:
    """Where to rank; None leaves it to the engine."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {engine!r}")
    if devices is None:
        return [device]
    if device is not None:
        raise ValueError("give either --device or --devices")
    places = [place.strip() for place in devices.split(",")]
    if not all(places):
        raise ValueError(f"--devices must be names with commas between them, such as cuda:0,cuda:1, got {devices!r}")
    return places
