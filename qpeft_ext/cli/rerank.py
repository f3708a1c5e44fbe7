"""``qpeft rerank``: rerank a run with an adapter, and compare it with the run before."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..prompts.passages import check_passages
from ..utils.console import say
from ..utils.files import expect_no_input
from ..utils.text import shorten
from ..utils.words import counted
from .common import (
    DATA,
    DETERMINISTIC_SCORES,
    LM,
    RUN_OUTPUT,
    SPLIT,
    TRUNCATE_QUERIES,
    Attention,
    Device,
    Dtype,
    IgnoreIdenticalIds,
    KvDtype,
    Measures,
    Option,
    Passages,
    PassageStride,
    PassageTokens,
    Resume,
    Revision,
    SpecialTokens,
    Template,
    dtype_of_job,
    expect_at_least,
    expect_kv_dtype_of,
    expect_names,
    from_dataclass,
    measure_names,
    parse_options,
)

if TYPE_CHECKING:
    from ..ranking.systems import SystemsSpec


@dataclass(frozen=True)
class RerankOptions:
    """Options of ``qpeft rerank``, in the order of its help."""

    data: Annotated[str, typer.Option(help=DATA)]
    output: Annotated[Path, typer.Option(help=RUN_OUTPUT)]
    model: Annotated[str | None, typer.Option(help="The adapter: a folder or a Hub id.")] = None
    base_model: Annotated[str | None, typer.Option(help=LM)] = None
    run: Annotated[
        Path | None,
        typer.Option(help="TREC run of the first stage.  [default: the candidates of the data set, or BM25]"),
    ] = None
    split: Annotated[str | None, typer.Option(help=SPLIT)] = None
    top_k: Annotated[int, typer.Option(help="Candidates per query that are reranked.")] = 100
    ignore_identical_ids: IgnoreIdenticalIds = False
    upr: Annotated[bool, typer.Option("--upr", help="Rerank by the plain LM (UPR) too, for comparison.")] = False
    similarity_only: Annotated[
        bool,
        typer.Option("--similarity-only", help="Rank by the similarities of the clues too, without the LM."),
    ] = False
    threshold: Annotated[
        float | None,
        typer.Option(help="Leave documents with a smaller relevance, in [0, 1], out of the run (see qpeft calibrate)."),
    ] = None
    measures: Measures = None
    revision: Revision = None
    dtype: Dtype = None
    attention: Attention = None
    device: Device = None
    devices: Annotated[
        str | None,
        typer.Option(help="Several devices, such as cuda:0,cuda:1 or cpu,cpu: each gets a process with its own model."),
    ] = None
    engine: Annotated[
        str, typer.Option(help="Kind of processes for --devices: local, or ray for one Ray actor each.")
    ] = "local"
    resume: Resume = True
    cache_bytes: Annotated[
        int, typer.Option(help="Memory per device for keys and values of documents, kept from query to query.")
    ] = 0
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Memory per device beside the weights, in bytes, or free for all free memory of the GPU. It sets the "
            "token budget and the caches, instead of --cache-bytes."
        ),
    ] = None
    index: Annotated[
        Path | None, typer.Option(help="Index made by qpeft index: keys and values of documents are read from it.")
    ] = None
    kv_dtype: KvDtype = None
    deterministic: Annotated[bool, typer.Option("--deterministic", help=DETERMINISTIC_SCORES)] = False
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Token budget of a pass.  [default: chosen for the device]")
    ] = None
    template: Template = None
    special_tokens: SpecialTokens = None
    option: Option = None
    max_query_tokens: Annotated[
        int | None,
        typer.Option(help="Longest query in tokens; a longer one is an error.  [default: the adapter's, or 64]"),
    ] = None
    truncate_queries: Annotated[bool, typer.Option("--truncate-queries", help=TRUNCATE_QUERIES)] = False
    max_document_tokens: Annotated[
        int | None,
        typer.Option(help="Longest document in tokens; a longer one is cut.  [default: the adapter's, or 256]"),
    ] = None
    passages: Passages = None
    passage_tokens: PassageTokens = None
    passage_stride: PassageStride = None


@from_dataclass(RerankOptions)
def command(options: RerankOptions) -> None:
    """Rerank the candidates of a first stage.

    --output is the ranking of the adapter. Without --model it is the ranking of --upr, or else of --similarity-only,
    with the LM of --base-model; or, without these, of the LM itself, which is a reranker then (Qwen3-Reranker, …). If
    the data set has judgements, a table shows the measures before and after.

    Example: qpeft rerank --data FOLDER --model ADAPTER --run bm25.trec --output mine.trec
    """
    from .. import formats
    from ..evaluation.comparison import compare_table
    from ..evaluation.measures import parse_measures
    from ..ranking.first_stage import asked_queries, first_stage
    from ..ranking.job import rerank_job
    from ..ranking.run import check_candidates

    _check_options(options)
    expect_no_input(options.output, options.data, options.run)
    places = _devices(options.device, options.devices, options.engine)
    split, output = options.split, options.output
    collection = formats.open_collection(options.data)
    corpus, asked, queries = collection.corpus, asked_queries(collection, split), collection.queries(split)
    names = measure_names(options.measures)
    if {"qrels", "answers"} & set(collection.parts):
        parse_measures(names)
    candidates, before = first_stage(collection, split, asked, options.run, options.top_k, options.ignore_identical_ids)
    check_candidates(candidates, queries, corpus, options.run)
    qrels = collection.judge(split, [candidates])
    spec = _systems(options, places)
    results = rerank_job(
        spec, queries, candidates, output, engine=options.engine, devices=places, resume=options.resume
    )
    for name, result in results.items():
        say(f"{name}: {result}")
    say(f"wrote {counted(sum(map(len, results[spec.names[0]].run.values())), 'lines')} to {output}")
    if qrels:
        label = f"{before} (before)" if before in results else before  # a run file may be called UPR.trec
        runs = {label: candidates} | {name: result.run for name, result in results.items()}
        say(compare_table(runs, qrels, names).render())
    else:
        splits = ", ".join(collection.splits) or "none"
        say(f"{options.data} has no judgements for these queries, so nothing is evaluated; its splits: {splits}")


def _check_options(options: RerankOptions) -> None:
    """Raises: ValueError for options that are missing, exclude each other, or are out of range."""
    expect_names(model=options.model, base_model=options.base_model)
    if not (options.model or options.base_model or options.upr or options.similarity_only):
        raise ValueError(
            "expected --model ADAPTER, or --base-model LM: a reranker, or any LM with --upr or --similarity-only"
        )
    if not (options.model or options.base_model):
        raise ValueError("expected --base-model LM, since there is no adapter that names one")
    expect_at_least(
        1,
        top_k=options.top_k,
        max_query_tokens=options.max_query_tokens,
        max_document_tokens=options.max_document_tokens,
        max_tokens_per_batch=options.max_tokens_per_batch,
    )
    if options.option and (options.model or options.upr or options.similarity_only):
        raise ValueError("--option is for an LM that is a reranker itself; leave it out, or --model, --upr, …")
    check_passages(options.passages, options.passage_tokens, options.passage_stride)
    expect_at_least(0, cache_bytes=options.cache_bytes)
    expect_kv_dtype_of(options.kv_dtype, options.cache_bytes, options.index, options.max_memory)
    if options.threshold is not None:
        if not 0 <= options.threshold <= 1:
            raise ValueError(f"--threshold must be in [0, 1], got {options.threshold:g}; it is of relevances")
        if options.similarity_only and not (options.model or options.upr):
            raise ValueError("--threshold is of the LM's relevances; add --model or --upr")
    if options.max_memory is not None:
        if options.cache_bytes:
            raise ValueError("--max-memory and --cache-bytes exclude each other")
        if not (options.max_memory == "free" or re.fullmatch("[0-9]{1,18}", options.max_memory)):
            raise ValueError(f"--max-memory must be a number of bytes or free, got {shorten(options.max_memory)}")


def _systems(options: RerankOptions, places: list[str | None]) -> SystemsSpec:
    """Return the description of the systems that rank on these devices, in this process or others."""
    from ..ranking.systems import SystemsSpec

    max_memory = options.max_memory
    return SystemsSpec(
        data=os.path.abspath(options.data) if os.path.exists(options.data) else options.data,
        model=options.model,
        base_model=options.base_model,
        upr=options.upr,
        similarity_only=options.similarity_only,
        dtype=dtype_of_job(options.dtype, places[0]),
        attention=options.attention,
        revision=options.revision,
        deterministic=options.deterministic,
        max_tokens_per_batch=options.max_tokens_per_batch,
        max_query_tokens=options.max_query_tokens,
        truncate_queries=options.truncate_queries,
        max_document_tokens=options.max_document_tokens,
        cache_bytes=options.cache_bytes,
        max_memory=int(max_memory) if max_memory and max_memory != "free" else max_memory,
        index=options.index.absolute() if options.index else None,
        kv_dtype=options.kv_dtype,
        template=options.template,
        special_tokens=options.special_tokens,
        options=parse_options(options.option or ()),
        threshold=options.threshold,
        passages=options.passages,
        passage_tokens=options.passage_tokens,
        passage_stride=options.passage_stride,
    )


def _devices(device: str | None, devices: str | None, engine: str) -> list[str | None]:
    """Return the devices to rank on; None leaves the choice to the engine."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {engine!r}")
    if devices is None:
        return [device]
    if device is not None:
        raise ValueError("give either --device or --devices")
    places: list[str | None] = [place.strip() for place in devices.split(",")]
    if not all(places):
        raise ValueError(f"--devices must be names with commas between them, such as cuda:0,cuda:1, got {devices!r}")
    return places
