"""``qpeft synthesize``: training queries for documents that have none."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.console import say
from ..utils.partial_file import kept
from .common import LM_NAMES, Device, Dtype, Resume, Revision, dtype_of_job, expect_at_least, from_dataclass

if TYPE_CHECKING:
    from ..config import QPeftConfig
    from ..synthesis.generator import QueryGenerator, Sampling


@dataclass(frozen=True)
class SynthesizeOptions:
    """Options of ``qpeft synthesize``, in the order of its help."""

    data: Annotated[str, typer.Option(help="Data set with documents, as for qpeft rerank --data.")]
    base_model: Annotated[str, typer.Option(help=f"The causal LM that writes the queries: {LM_NAMES}.")]
    output: Annotated[
        Path,
        typer.Option(help="Training examples to write, as JSON lines; compressed if the name ends in .gz."),
    ]
    documents: Annotated[int | None, typer.Option(help="Number of documents, chosen at random.  [default: all]")] = None
    queries_per_document: Annotated[int, typer.Option(help="Queries written for each document.")] = 1
    temperature: Annotated[
        float, typer.Option(help="Divisor of the logits; with 0 the likeliest token is always taken.")
    ] = 1.0
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = 0.95
    top_k: Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 for all.")] = 0
    max_new_tokens: Annotated[int, typer.Option(help="Longest query in tokens; a longer one is cut.")] = 48
    instruction: Annotated[
        str | None,
        typer.Option(help="Start of every prompt; it may include examples.  [default: as in training]"),
    ] = None
    max_document_tokens: Annotated[int, typer.Option(help="Longest document in tokens; a longer one is cut.")] = 256
    max_query_tokens: Annotated[int, typer.Option(help="Queries longer than this are dropped.")] = 64
    min_tokens: Annotated[int, typer.Option(help="Queries shorter than this are dropped.")] = 3
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Keep queries that were cut at --max-new-tokens.")
    ] = False
    min_log_likelihood: Annotated[
        float | None,
        typer.Option(help="Lowest log likelihood of a query given its document, in nats per token.  [default: any]"),
    ] = None
    keep_fraction: Annotated[float, typer.Option(help="Share of the queries that is kept, the likeliest.")] = 1.0
    round_trip_top: Annotated[
        int,
        typer.Option(help="Keep a query only if BM25 finds its document among this many best."),
    ] = 20
    no_round_trip: Annotated[bool, typer.Option("--no-round-trip", help="Keep queries whatever BM25 finds.")] = False
    num_negatives: Annotated[int, typer.Option(help="Negatives per query from BM25; 0 for none.")] = 11
    depth: Annotated[
        int, typer.Option(help="Number of the best candidates of a query that its negatives are drawn from.")
    ] = 40
    seed: Annotated[int, typer.Option(help="Seed of the choice of documents, of queries and of negatives.")] = 0
    resume: Resume = True
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Token budget of a batch.  [default: chosen for the device]")
    ] = None
    revision: Revision = None
    dtype: Dtype = None
    device: Device = None


@from_dataclass(SynthesizeOptions)
def command(options: SynthesizeOptions) -> None:
    """Write training queries for documents with an LM.

    Queries that do not find their document again are dropped. Dropped queries are counted and printed. After an
    interruption the same command resumes; filters and negatives may be changed then.

    Example: qpeft synthesize --data FOLDER --base-model LM --output train.jsonl, then qpeft train --train train.jsonl
    """
    expect_at_least(
        1,
        documents=options.documents,
        round_trip_top=options.round_trip_top,
        max_tokens_per_batch=options.max_tokens_per_batch,
    )
    if options.no_round_trip and options.round_trip_top != SynthesizeOptions.round_trip_top:
        raise ValueError("--no-round-trip keeps queries whatever BM25 finds, and --round-trip-top says what: give one")
    from .. import formats
    from ..config import DEFAULT_INSTRUCTION, QPeftConfig
    from ..lm.loading import default_device, quiet_transformers
    from ..synthesis.filters import Filters
    from ..synthesis.generator import Sampling
    from ..synthesis.training_set import PartialQueries, choose_documents, generate_queries, write_training_set
    from ..utils.environment import versions
    from ..utils.files import expect_no_input

    sampling = Sampling(
        options.queries_per_document,
        options.temperature,
        options.top_p,
        options.top_k,
        options.max_new_tokens,
        options.seed,
    )
    filters = Filters(
        options.min_tokens,
        options.keep_unfinished,
        options.min_log_likelihood,
        options.keep_fraction,
        0 if options.no_round_trip else options.round_trip_top,
        options.num_negatives,
        options.depth,
    )
    config = QPeftConfig(
        clues="none",
        instruction=DEFAULT_INSTRUCTION if options.instruction is None else options.instruction,
        max_document_tokens=options.max_document_tokens,
        max_query_tokens=options.max_query_tokens,
    )
    expect_no_input(options.output, options.data)
    corpus = formats.open_collection(options.data).corpus
    doc_ids = choose_documents(corpus, options.documents, options.seed)
    device = default_device(options.device)
    quiet_transformers()
    settings = _settings(options, sampling, config, corpus, len(doc_ids))
    about = {
        "base model": options.base_model,
        "data": options.data,
        "filters": asdict(filters),
        "versions": versions(("torch", "transformers")),
    }
    partial = PartialQueries(options.output, len(doc_ids), settings, about=about, resume=options.resume)
    with kept(partial):
        generate_queries(_generator(options, config, sampling, device), corpus, doc_ids, partial)
        all_settings = {"settings": settings, **about}
        say(str(write_training_set(partial, corpus, doc_ids, filters, options.seed, all_settings)))
        say(f"wrote {options.output}")


def _settings(
    options: SynthesizeOptions, sampling: Sampling, config: QPeftConfig, corpus: Any, documents: int
) -> dict[str, object]:
    """Return everything that the queries depend on; a part with other settings is not resumed."""
    from ..lm.loading import lm_digest

    return {
        "base model": lm_digest(options.base_model, revision=options.revision),
        "dtype": dtype_of_job(options.dtype, options.device),
        "corpus": corpus.version(),
        "documents": documents,
        **asdict(sampling),
        "instruction": config.instruction,
        "max_document_tokens": options.max_document_tokens,
        "max_query_tokens": options.max_query_tokens,
        "max_tokens_per_batch": options.max_tokens_per_batch,
    }


def _generator(options: SynthesizeOptions, config: QPeftConfig, sampling: Sampling, device: str) -> QueryGenerator:
    from ..lm.loading import load_lm
    from ..model import get_qpeft_model
    from ..synthesis.generator import QueryGenerator

    lm = load_lm(options.base_model, dtype=options.dtype, device=device, revision=options.revision)
    model = get_qpeft_model(lm, config)
    generator = QueryGenerator(model, sampling, options.max_tokens_per_batch)
    if not generator.has_end:
        say(
            "the LM's tokenizer has neither a line end nor an end token, so no query will end by itself; use "
            "--keep-unfinished and a small --max-new-tokens"
        )
    return generator
