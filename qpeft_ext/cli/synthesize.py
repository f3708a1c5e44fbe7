"""``qpeft synthesize``: training queries for documents that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Dtype


def command(
    data: Annotated[str, typer.Option(help="Collection with a corpus, as for qpeft rerank --data.")],
    base_model: Annotated[str, typer.Option(help="The LM that writes, a causal one: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option(help="Training examples to write, jsonl; .gz by its name.")],
    documents: Annotated[int | None, typer.Option(help="How many, chosen at random.  [default: all]")] = None,
    queries_per_document: Annotated[int, typer.Option(help="Queries written for each document.")] = 1,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0: the likeliest token each time.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: all.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="A query that has no end by then is cut.")] = 48,
    instruction: Annotated[
        str | None, typer.Option(help="Start of every prompt, examples included if wanted.  [default: as in training]")
    ] = None,
    max_document_tokens: Annotated[int, typer.Option(help="A longer document is cut.")] = 256,
    max_query_tokens: Annotated[int, typer.Option(help="A longer query is dropped.")] = 64,
    min_tokens: Annotated[int, typer.Option(help="A shorter query is dropped.")] = 3,
    keep_unfinished: Annotated[bool, typer.Option("--keep-unfinished", help="Keep queries that were cut.")] = False,
    min_log_likelihood: Annotated[
        float | None, typer.Option(help="Of a query given its document: mean per token, nats.  [default: any]")
    ] = None,
    keep_fraction: Annotated[float, typer.Option(help="Keep only this share of the queries, the likeliest.")] = 1.0,
    round_trip_top: Annotated[
        int, typer.Option(help="The document must be among so many best of BM25 for its query.")
    ] = 20,
    no_round_trip: Annotated[bool, typer.Option("--no-round-trip", help="Do not ask for that.")] = False,
    num_negatives: Annotated[int, typer.Option(help="Negatives per query, from BM25; 0: none.")] = 11,
    depth: Annotated[int, typer.Option(help="Negatives are drawn from this many best candidates.")] = 40,
    seed: Annotated[int, typer.Option(help="Of documents, draws and negatives.")] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Go on with OUTPUT.part, which the same job left when it was interrupted; or start over.",
        ),
    ] = True,
    max_tokens_per_batch: Annotated[int | None, typer.Option(help="Token budget of a batch.")] = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Write training queries for documents with an LM, and keep those that lead back to their document.

    What is dropped is counted and printed. After a kill the same command goes on; filters and negatives may be others
    then. Example: qpeft synthesize --data FOLDER --base-model LM --output train.jsonl, then qpeft train --train
    train.jsonl
    """
    for option, value in (
        ("--documents", documents),
        ("--round-trip-top", round_trip_top),
        ("--max-tokens-per-batch", max_tokens_per_batch),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    from dataclasses import asdict

    from .. import formats
    from ..config import DEFAULT_INSTRUCTION, QPeftConfig
    from ..lm.loading import default_device, lm_digest, load_lm, quiet_transformers
    from ..model import get_qpeft_model
    from ..synthesis.filters import Filters
    from ..synthesis.generator import QueryGenerator, Sampling
    from ..synthesis.training_set import PartialQueries, choose_documents, generate_queries, write_training_set
    from ..utils.console import Interrupted, say
    from ..utils.environment import versions

    sampling = Sampling(queries_per_document, temperature, top_p, top_k, max_new_tokens, seed)
    filters = Filters(
        min_tokens,
        keep_unfinished,
        min_log_likelihood,
        keep_fraction,
        0 if no_round_trip else round_trip_top,
        num_negatives,
        depth,
    )
    config = QPeftConfig(
        clues="none",
        instruction=DEFAULT_INSTRUCTION if instruction is None else instruction,
        max_document_tokens=max_document_tokens,
        max_query_tokens=max_query_tokens,
    )
    corpus = formats.open_collection(data).corpus
    doc_ids = choose_documents(corpus, documents, seed)
    device = default_device(device)
    quiet_transformers()
    settings = {
        "base model": lm_digest(base_model), "dtype": dtype, "corpus": corpus.version(), "documents": len(doc_ids),
        **asdict(sampling), "instruction": config.instruction, "max_document_tokens": max_document_tokens,
        "max_query_tokens": max_query_tokens, "max_tokens_per_batch": max_tokens_per_batch,
    }  # fmt: skip
    about = {
        "base model": base_model,
        "data": data,
        "filters": asdict(filters),
        "versions": versions(("torch", "transformers")),
    }
    partial = PartialQueries(output, len(doc_ids), settings, about=about, resume=resume)
    try:
        if partial.num_resumed:
            say(f"{partial}: going on from there")
        generator = QueryGenerator(
            get_qpeft_model(load_lm(base_model, dtype=dtype, device=device), config), sampling, max_tokens_per_batch
        )
        if not generator.has_end:
            say(
                "the LM's tokenizer has neither a line end nor an end token, so no query will end by itself; use "
                "--keep-unfinished and a small --max-new-tokens"
            )
        generate_queries(generator, corpus, doc_ids, partial)
        say(str(write_training_set(partial, corpus, doc_ids, filters, seed, {"settings": settings} | about)))
        say(f"wrote {output}")
    except KeyboardInterrupt:
        kept = f"; {partial}: the same command goes on from there" if partial.batches else ""
        raise Interrupted(f"interrupted{kept}") from None
    except Exception as error:
        if partial.batches:
            error.add_note(f"{partial}: the same command goes on from there")
        raise
    finally:
        partial.close()
