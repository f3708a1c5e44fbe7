"""Options of ``qpeft train``, and checks of their values."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    LM_NAMES,
    TRUNCATE_QUERIES,
    Attention,
    Device,
    Dtype,
    IgnoreIdenticalIds,
    KvDtype,
    Revision,
    expect_at_least,
    expect_kv_dtype_of,
)

SCHEDULERS = (  # those of transformers that need no further settings
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of ``qpeft train``, in the order of its help."""

    base_model: Annotated[str, typer.Option(help=f"The LM: {LM_NAMES}. It stays frozen.")]
    output: Annotated[
        Path, typer.Option(help="Folder for the adapter; checkpoints are written to its subfolder checkpoints.")
    ]
    data: Annotated[
        str | None,
        typer.Option(help="Data set with training examples, or with qrels of --split (see docs/formats.md)."),
    ] = None
    train: Annotated[
        Path | None,
        typer.Option(
            help="Training examples instead of --data, as JSON lines with query, positives and negatives, or with the "
            "keys of sentence-transformers, FlagEmbedding or Tevatron."
        ),
    ] = None
    dev: Annotated[Path | None, typer.Option(help="Examples to evaluate on during training, as JSON lines.")] = None
    run: Annotated[
        Path | None,
        typer.Option(help="TREC run that gives the negatives of --data.  [default: its own candidates, or BM25]"),
    ] = None
    split: Annotated[str, typer.Option(help="Split of --data to train on, if it has splits.")] = "train"
    queries: Annotated[
        int | None, typer.Option(help="Number of queries to train on, drawn with --seed.  [default: all]")
    ] = None
    num_negatives: Annotated[int, typer.Option(help="Negatives per query.")] = 7
    depth: Annotated[
        int, typer.Option(help="Number of the best candidates of a query that its negatives are drawn from.")
    ] = 40
    ignore_identical_ids: IgnoreIdenticalIds = False
    clues: Annotated[str, typer.Option(help="Clue module: top_k (Q-PEFT-R), attention (Q-PEFT-A) or none.")] = "top_k"
    k: Annotated[int | None, typer.Option(help="Clues per document, for --clues top_k.  [default: 10]")] = None
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, for --clues attention.  [default: 8]")] = None
    rank: Annotated[
        int | None,
        typer.Option(help="Inner width of the clue module.  [default: 256, or the LM's width if that is smaller]"),
    ] = None
    generated_lora_rank: Annotated[
        int | None,
        typer.Option(help="Rank of the LoRA that the query generates; 0 for none.  [default: 16 with clues]"),
    ] = None
    lora_rank: Annotated[
        int, typer.Option(help="Rank of a LoRA of peft in the LM, which is trained too; 0 for none.")
    ] = 0
    lora_option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for any option of peft's LoraConfig, such as target_modules=all-linear; may be repeated.  "
            "[default: lora_alpha is twice the rank, target_modules are those of peft for the LM]"
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            help="Template of the prompt: qpeft, upr or chat; or, with --clues none, that of a reranker "
            "(qwen3_reranker, …) or a file of Jinja2.  [default: qpeft]"
        ),
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(help="Where clues and document stand: document_first, or clues_first.  [default: the template's]"),
    ] = None
    score: Annotated[
        str | None,
        typer.Option(
            help="What documents are ranked by: likelihood, or yes_no, graded or both, for which the LM is asked "
            "behind the query.  [default: likelihood]"
        ),
    ] = None
    loss: Annotated[
        str,
        typer.Option(
            help="listwise, pointwise_pairwise, pointwise, pairwise, contrastive, binary_cross_entropy, ranknet, "
            "lambda_loss, margin_mse or kl_divergence."
        ),
    ] = "listwise"
    margin: Annotated[
        float, typer.Option(help="Margin of --loss pairwise and pointwise_pairwise, in nats per query token.")
    ] = 0.0
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate; choose it by the results on dev.")] = 1e-3
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0
    max_steps: Annotated[int, typer.Option(help="Stop after this many steps; -1 for the end of --epochs.")] = -1
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW on weight matrices.")] = 0.0
    warm_up: Annotated[
        float,
        typer.Option(help="Steps in which the learning rate rises; a value below 1 is a share of all steps."),
    ] = 0.0
    scheduler: Annotated[str, typer.Option(help=f"Schedule of the learning rate: {', '.join(SCHEDULERS)}.")] = "linear"
    max_grad_norm: Annotated[float, typer.Option(help="Longest gradient; longer ones are scaled. 0: no limit.")] = 1.0
    max_query_tokens: Annotated[int, typer.Option(help="Longest query in tokens; a longer one is an error.")] = 64
    truncate_queries: Annotated[bool, typer.Option("--truncate-queries", help=TRUNCATE_QUERIES)] = False
    max_document_tokens: Annotated[int, typer.Option(help="Longest document in tokens; a longer one is cut.")] = 256
    queries_per_group: Annotated[
        int, typer.Option(help="Queries that are trained together and share their documents.")
    ] = 4
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Queries that a device reads at once, a multiple of --queries-per-group.  [default: one group]"
        ),
    ] = None
    gradient_accumulation: Annotated[
        int,
        typer.Option(
            "--gradient-accumulation", "--gradient-accumulation-steps", help="Batches per step of the optimiser."
        ),
    ] = 1
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Keep a tenth of the queries back, at most 200, and fit relevances in [0, 1] to them at the end (see "
            "qpeft calibrate).",
        ),
    ] = False
    save_steps: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints; with --dev the best one is kept.  [default: no checkpoints]"),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last complete checkpoint in --output.")] = (
        False
    )
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the adapter and checkpoints of an earlier run.")
    ] = False
    cache_bytes: Annotated[
        int, typer.Option(help="Memory for keys and values of documents, which are kept from epoch to epoch.")
    ] = 0
    index: Annotated[
        Path | None,
        typer.Option(help="Index made by qpeft index with this LM; documents that it lacks are computed."),
    ] = None
    kv_dtype: KvDtype = None
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Make resumed runs end bit-equal; slower.")] = (
        False
    )
    report_to: Annotated[str, typer.Option(help="Where transformers reports to: tensorboard, wandb, … or none.")] = (
        "none"
    )
    revision: Revision = None
    dtype: Dtype = None
    attention: Attention = None
    device: Device = None
    seed: Annotated[int, typer.Option(help="Seed of initial weights, order and negatives.")] = 0
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for any option of QPeftConfig; may be repeated.")
    ] = None


MAX_EPOCHS = 1_000_000  # with more the number of steps may be none that transformers can count to
OF_CANDIDATES = ("run", "depth", "ignore_identical_ids")


def expect_none_of_data(options: TrainOptions, what: str, *names: str) -> None:
    """Raises: ValueError for one of the options that is given, and does nothing with ``what``."""
    for field in fields(options):
        if field.name in names and getattr(options, field.name) != field.default:
            raise ValueError(
                f"--{field.name.replace('_', '-')} is of --data with qrels and does nothing with {what}; leave it out"
            )


def check_options(options: TrainOptions) -> None:
    """Raises: ValueError for options that exclude each other, or a value that would be ignored or train nothing."""
    if (options.data is None) == (options.train is None):
        raise ValueError("expected either --data FOLDER or --train FILE")
    if options.train is not None:
        expect_none_of_data(options, "--train, whose examples have their negatives", "split", *OF_CANDIDATES)
    for name, value in (("--learning-rate", options.learning_rate), ("--epochs", options.epochs)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if options.epochs > MAX_EPOCHS:
        raise ValueError(f"--epochs must be at most {MAX_EPOCHS:,}, got {options.epochs:g}")
    if not 0 <= options.seed < 2**32:  # those of numpy, which transformers sets too
        raise ValueError(f"--seed must be from 0 to {2**32 - 1}, got {options.seed}")
    for name, value in (
        ("--weight-decay", options.weight_decay),
        ("--warm-up", options.warm_up),
        ("--max-grad-norm", options.max_grad_norm),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if options.max_steps < 1 and options.max_steps != -1:
        raise ValueError(f"--max-steps must be at least 1, or -1 for --epochs, got {options.max_steps}")
    expect_at_least(1, gradient_accumulation=options.gradient_accumulation, queries=options.queries)
    if options.scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {options.scheduler!r}")
    warm_up = options.warm_up
    if warm_up >= 1 and warm_up != int(warm_up):
        raise ValueError(f"--warm-up must be a number of steps, or a share of them below 1, got {warm_up}")
    if warm_up and options.scheduler == "constant":
        raise ValueError(f"--warm-up {warm_up:g} does nothing with --scheduler constant; use constant_with_warmup")
    expect_at_least(1, save_steps=options.save_steps)
    expect_at_least(0, cache_bytes=options.cache_bytes, lora_rank=options.lora_rank)
    if options.lora_option and not options.lora_rank:
        raise ValueError("--lora-option is of the LoRA that --lora-rank asks for; add --lora-rank 8, or leave it out")
    expect_kv_dtype_of(options.kv_dtype, options.cache_bytes, options.index)
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on and --overwrite starts anew: give one of them")
    if options.report_to != "none":
        _expect_reporter(options.report_to)


def _expect_reporter(name: str) -> None:
    """Raises: ValueError if transformers cannot report there."""
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(name):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--report-to {name}: {' '.join(str(error).split())}") from None
