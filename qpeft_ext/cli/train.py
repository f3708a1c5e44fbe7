"""``qpeft train``: train an adapter on a BEIR folder or on a file of examples."""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ..utils.console import is_first_process
from ..utils.files import drop_temporary, private_folder
from ..utils.locks import locked_folder
from .common import Attention, Device, Dtype, IgnoreIdenticalIds, parse_options

CHECKPOINTS = "checkpoints"
# of transformers, those that need no further settings
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def _one_at_a_time(command: Callable[..., None]) -> Callable[..., None]:
    """Two trainings into one folder would mix their checkpoints."""

    @functools.wraps(command)
    def locked(**options) -> None:
        output = options["output"]
        if not is_first_process() or output.exists() and not output.is_dir():  # `_check_output` says what is wrong
            return command(**options)
        with locked_folder(output):
            return command(**options)

    return locked


@_one_at_a_time
def command(
    base_model: Annotated[str, typer.Option(help="LM: a folder or a Hub id; it stays frozen.")],
    output: Annotated[Path, typer.Option(help="Folder for the adapter; checkpoints go to its folder checkpoints.")],
    data: Annotated[
        str | None, typer.Option(help="Collection with training examples, or with qrels of --split (see README).")
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(
            help="Examples, jsonl: query, positives, negatives; or the keys of "
            "sentence-transformers, FlagEmbedding or Tevatron."
        ),
    ] = None,
    dev: Annotated[Path | None, typer.Option(help="Examples for evaluation in training, jsonl.")] = None,
    run: Annotated[
        Path | None, typer.Option(help="TREC run for the negatives of --data.  [default: its candidates, else BM25]")
    ] = None,
    split: Annotated[str, typer.Option(help="Which split of --data to train on, if it has any.")] = "train",
    num_negatives: Annotated[int, typer.Option(help="Negatives per query.")] = 7,
    depth: Annotated[int, typer.Option(help="Negatives are drawn from this many best candidates.")] = 40,
    ignore_identical_ids: IgnoreIdenticalIds = False,
    clues: Annotated[str, typer.Option(help="top_k (Q-PEFT-R), attention (Q-PEFT-A) or none.")] = "top_k",
    k: Annotated[int | None, typer.Option(help="Clues per document, for top_k.  [default: 10]")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads, for attention.  [default: 8]")] = None,
    rank: Annotated[int | None, typer.Option(help="Inner width of the clue module.  [default: 256 at most]")] = None,
    generated_lora_rank: Annotated[
        int | None,
        typer.Option(help="Of the update of the LM that the query generates; 0: none.  [default: 16 with clues]"),
    ] = None,
    loss: Annotated[str, typer.Option(help="pointwise_pairwise, listwise, contrastive, ...")] = "listwise",
    margin: Annotated[float, typer.Option(help="Of the pairwise loss, in nats per query token.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Peak; choose it on dev.")] = 1e-3,
    epochs: Annotated[float, typer.Option(help="Passes over the examples.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Stop after so many steps; -1: see --epochs.")] = -1,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW, on weight matrices.")] = 0.0,
    warm_up: Annotated[
        float, typer.Option(help="Steps in which the learning rate rises; below 1: a share of all steps.")
    ] = 0.0,
    scheduler: Annotated[str, typer.Option(help=f"Of the learning rate: {', '.join(SCHEDULERS)}.")] = "linear",
    max_grad_norm: Annotated[float, typer.Option(help="Longer gradients are cut to this; 0: never.")] = 1.0,
    max_query_tokens: Annotated[int, typer.Option(help="A longer query is an error.")] = 64,
    truncate_queries: Annotated[
        bool, typer.Option("--truncate-queries", help="Cut longer queries at their end, instead of the error.")
    ] = False,
    max_document_tokens: Annotated[int, typer.Option(help="A longer document is cut.")] = 256,
    queries_per_group: Annotated[int, typer.Option(help="Queries that share their documents.")] = 4,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Queries a device reads at once, a multiple of --queries-per-group.  [default: one group]"),
    ] = None,
    gradient_accumulation: Annotated[
        int,
        typer.Option(
            "--gradient-accumulation", "--gradient-accumulation-steps", help="Batches per step of the optimiser."
        ),
    ] = 1,
    save_steps: Annotated[
        int | None, typer.Option(help="Checkpoint every so many steps; with --dev the best is kept.  [default: none]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="From the last checkpoint in --output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")] = False,
    cache_bytes: Annotated[int, typer.Option(help="Memory for documents' prefixes, kept from epoch to epoch.")] = 0,
    index: Annotated[
        Path | None, typer.Option(help="Prefixes made by qpeft index with this LM; what it does not have is computed.")
    ] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Resumed runs end bit-equal; slower.")] = False,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none.")] = "none",
    dtype: Dtype = None,
    attention: Attention = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Of initial weights, order and negatives.")] = 0,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: any option of QPeftConfig; repeatable.")] = None,
) -> None:
    """Train an adapter: the LM stays frozen, only the module that makes the clues learns.

    On several GPUs: torchrun --nproc-per-node N -m qpeft_ext.cli train ...; each of them takes a group of queries, so a
    step has N times as many, and equals one of a single device with N times --gradient-accumulation.
    """
    if (data is None) == (train is None):
        raise ValueError("expected either --data FOLDER or --train FILE")
    _check_schedule(
        learning_rate, epochs, max_steps, weight_decay, warm_up, scheduler, max_grad_norm, gradient_accumulation
    )
    if save_steps is not None and save_steps < 1:
        raise ValueError(f"--save-steps must be at least 1, got {save_steps}")
    if cache_bytes < 0:
        raise ValueError(f"--cache-bytes must be at least 0, got {cache_bytes}")
    if resume and overwrite:
        raise ValueError("--resume goes on and --overwrite starts anew: give one of them")
    resumed = resume and _has_checkpoint(output)
    if is_first_process():
        _check_output(output, resume, overwrite, resumed)

    from ..config import QPeftConfig
    from ..lm.loading import default_device, load_lm, quiet_transformers
    from ..prefixes.cache import DocumentCache
    from ..utils.console import say

    settings = {
        "clues": clues,
        "rank": "auto" if rank is None else rank,
        "loss": loss,
        "margin": margin,
        "queries_per_group": queries_per_group,
        "num_hard_negatives": num_negatives,
        "max_query_tokens": max_query_tokens,
        "max_document_tokens": max_document_tokens,
        "seed": seed,
    }
    given = parse_options(option or [])
    settings |= _of_the_clues((settings | given)["clues"], k, num_heads)
    if generated_lora_rank is not None:
        settings["generated_lora_rank"] = generated_lora_rank or None
    if "generated_lora_rank" in given:  # --option sets this one field, and target_modules keeps its own default
        settings["target_modules"] = None
    settings |= given
    config = QPeftConfig.recommended(**settings)  # a wrong option is known before anything is read
    if config.clues == "none" and config.num_virtual_tokens is None and config.generated_lora_rank is None:
        raise ValueError(
            "--clues none is UPR, which has nothing to train: use qpeft rerank --upr, or add "
            "--generated-lora-rank 16 or a soft prompt, --option num_virtual_tokens=20"
        )
    batch_size = _batch_size(batch_size, config.queries_per_group)
    cache = DocumentCache(cache_bytes, index=index) if cache_bytes or index else None
    examples, dev_examples = _read(data, split, train, dev, run, num_negatives, depth, seed, ignore_identical_ids)
    config = QPeftConfig.recommended(examples, **settings)
    if not (config.in_batch_negatives or "in_batch_negatives" in given):
        say("no in-batch negatives: every query has enough of its own")
    from ..training.examples import lacking_negatives

    lacking_negatives(examples, config)  # before the LM is loaded
    device = default_device(device)
    quiet_transformers()
    from ..model import get_qpeft_model
    from ..training.fit import fit

    checkpoints = output / CHECKPOINTS
    if overwrite and checkpoints.exists() and is_first_process():
        shutil.rmtree(checkpoints)  # a later --resume must not find the earlier run's
    model = get_qpeft_model(load_lm(base_model, dtype=dtype, device=device, attention=attention), config)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)")
    trainer = fit(
        model,
        examples,
        checkpoints,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_steps=max_steps,
        warm_up=warm_up,
        dev=dev_examples,
        save_every=save_steps,
        seed=seed,
        cache=cache,
        deterministic=deterministic,
        truncate_queries=truncate_queries,
        resume=resumed,
        num_train_epochs=epochs,
        gradient_accumulation_steps=gradient_accumulation,
        weight_decay=weight_decay,
        lr_scheduler_type=scheduler,
        max_grad_norm=max_grad_norm,
        save_total_limit=2,
        report_to=report_to,
    ).trainer
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
    fitted = config.temperature == "auto" and model.qpeft_config.temperature != "auto"
    note = f" (its loss has the temperature {model.qpeft_config.temperature:g}, which fits the LM)" if fitted else ""
    say(f"wrote the adapter to {output}{note}")
    trainer.accelerator.end_training()  # a process group that is left to the interpreter's exit can abort the process


def _of_the_clues(clues: str, k: int | None, num_heads: int | None) -> dict[str, int]:
    """Return the given options of the clues. Raises: ValueError for one that other clues have, and these do not."""
    from ..config import CLUES

    options = {}
    for flag, name, value, kind in (("--k", "k", k, "top_k"), ("--num-heads", "num_heads", num_heads, "attention")):
        if value is not None and clues in CLUES and clues != kind:  # a typo is the config's to name
            raise ValueError(
                f"{flag} {value} is of --clues {kind} and does nothing with {clues}; leave it out, or "
                f"train with --clues {kind}"
            )
        if value is not None:
            options[name] = value
    return options


def _check_schedule(
    learning_rate: float,
    epochs: float,
    max_steps: int,
    weight_decay: float,
    warm_up: float,
    scheduler: str,
    max_grad_norm: float,
    gradient_accumulation: int,
) -> None:
    """Raises: ValueError for a value that would be ignored, or would train nothing."""
    for option, value in (("--learning-rate", learning_rate), ("--epochs", epochs)):
        if not 0 < value < math.inf:
            raise ValueError(f"{option} must be above 0, got {value}")
    for option, value in (("--weight-decay", weight_decay), ("--warm-up", warm_up), ("--max-grad-norm", max_grad_norm)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{option} must be at least 0, got {value}")
    if max_steps < 1 and max_steps != -1:
        raise ValueError(f"--max-steps must be at least 1, or -1 for --epochs, got {max_steps}")
    if gradient_accumulation < 1:
        raise ValueError(f"--gradient-accumulation must be at least 1, got {gradient_accumulation}")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {scheduler!r}")
    if warm_up >= 1 and warm_up != int(warm_up):
        raise ValueError(f"--warm-up must be a number of steps, or a share of them below 1, got {warm_up}")
    if warm_up and scheduler == "constant":
        raise ValueError(f"--warm-up {warm_up:g} does nothing with --scheduler constant; use constant_with_warmup")


def _batch_size(asked: int | None, group: int) -> int:
    """Queries of a batch. Raises: ValueError if they are no whole groups."""
    if asked is not None and (asked < 1 or asked % group):
        raise ValueError(
            f"--batch-size must be a multiple of --queries-per-group, {group}, got {asked}: queries that "
            f"share their documents are read together; --gradient-accumulation adds up batches"
        )
    return group if asked is None else asked


def _read(
    data, split, train, dev, run, num_negatives, depth, seed, ignore_identical_ids=False
) -> tuple[list, list | None]:
    """Training examples and, if asked for, those for evaluation."""
    from .. import formats
    from ..ranking.first_stage import first_stage
    from ..utils.console import say

    dev_examples = formats.read_examples(dev) if dev else None
    if train:
        examples = formats.read_examples(train)
        say(f"{len(examples)} training examples")
        return examples, dev_examples
    collection = formats.open_collection(data)
    name = collection.choose_split(split) if collection.splits else None
    if collection.has("examples", name):
        examples = list(collection.examples(name))
        left_out = "".join(f"; {count} {what} left out" for what, count in collection.left_out.items() if count)
        say(f"{len(examples)} training examples{left_out}")
        return examples, dev_examples
    qrels, corpus, queries = collection.qrels(name), collection.corpus, collection.queries(name)
    asked = {query_id: queries[query_id] for query_id in qrels if query_id in queries}
    # as many candidates as are relevant may have to be passed over to find `depth` that are not
    candidates, _ = first_stage(
        collection, name, asked, run, depth + max(map(len, qrels.values())), ignore_identical_ids
    )
    examples, counts = formats.training_examples(
        queries, qrels, candidates, corpus, num_negatives=num_negatives, depth=depth, seed=seed
    )
    say(str(counts))
    return examples, dev_examples


def _has_checkpoint(output: Path) -> bool:
    from ..training.checkpoints import last_complete

    return last_complete(output / CHECKPOINTS)[0] is not None


def _check_output(output: Path, resume: bool, overwrite: bool, resumed: bool) -> None:
    """Know at once that the adapter can be saved; training takes hours.

    resumed: ``resume`` found a checkpoint.
    """
    from ..utils.console import say

    adapter, checkpoints = output / "adapter_config.json", output / CHECKPOINTS
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; expected a folder for the adapter")
    if adapter.exists() and resume and not resumed:
        raise ValueError(
            f"{output} holds an adapter, and {checkpoints} no complete checkpoint to resume from; name "
            f"another folder, or --overwrite to train it anew"
        )
    if adapter.exists() and not (resume or overwrite):
        raise ValueError(f"{output} already holds an adapter; name another folder, or --overwrite")
    if checkpoints.exists() and not (resume or overwrite):
        raise ValueError(f"{output} holds checkpoints of an earlier run; --resume goes on, --overwrite starts anew")
    if resume and not resumed:
        say(f"{checkpoints} has no complete checkpoint: training starts at the beginning")
    drop_temporary(output)
    with private_folder(output / "adapter"):
        pass
