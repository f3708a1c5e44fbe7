"""``qpeft train``: train an adapter on a data set or on a file of examples."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.console import is_first_process, say
from ..utils.files import drop_temporary, private_folder
from ..utils.locks import locked_folder
from .common import from_dataclass, parse_options
from .train_options import TrainOptions, check_options

if TYPE_CHECKING:
    from ..config import QPeftConfig
    from ..model import QPeftModel
    from ..prefixes.cache import DocumentCache
    from ..ranking.judged import Judged

CHECKPOINTS = "checkpoints"
_FEWEST_KEPT_BACK, _MOST_KEPT_BACK = 20, 200  # queries to calibrate on
_CANDIDATES = 20  # of each of them


def _one_at_a_time(command: Callable[[TrainOptions], None]) -> Callable[[TrainOptions], None]:
    """Let one process train into a folder at a time, since two would mix their checkpoints."""

    @functools.wraps(command)
    def locked(options: TrainOptions) -> None:
        output = options.output
        if not is_first_process() or output.exists() and not output.is_dir():  # `_check_output` explains that error
            return command(options)
        with locked_folder(output):
            return command(options)

    return locked


@from_dataclass(TrainOptions)
@_one_at_a_time
def command(options: TrainOptions) -> None:
    """Train an adapter; the LM stays frozen.

    The clue module and the generated LoRA are trained, and whatever else --option asks for.

    On several GPUs: torchrun --nproc-per-node N -m qpeft_ext.cli train ... Each GPU reads its own group of queries, so
    a step has N times as many, and equals a step on one GPU with N times --gradient-accumulation.
    """
    check_options(options)
    resumed = options.resume and _has_checkpoint(options.output)
    if is_first_process():
        _check_output(options.output, options.resume, options.overwrite, resumed)

    from ..lm.loading import default_device, load_lm, quiet_transformers
    from ..prefixes.cache import DocumentCache

    settings = _settings(options)
    config = _config(settings)  # a wrong option is an error before anything is read
    batch_size = _batch_size(options.batch_size, config.queries_per_group)
    has_cache = options.cache_bytes or options.index
    cache = None
    if has_cache:
        cache = DocumentCache(options.cache_bytes, index=options.index, kv_dtype=options.kv_dtype)
    examples, dev_examples = _read(options)
    judged, examples = _kept_back(options, examples) if options.calibrate else (None, examples)
    config = _config(settings, examples)
    device = default_device(options.device)
    quiet_transformers()
    from ..model import get_qpeft_model
    from ..training.fit import fit

    checkpoints = options.output / CHECKPOINTS
    if options.overwrite and checkpoints.exists() and is_first_process():
        shutil.rmtree(checkpoints)  # a later --resume must not find the earlier run's
    lm = load_lm(
        options.base_model,
        dtype=options.dtype,
        device=device,
        attention=options.attention,
        revision=options.revision,
    )
    model = get_qpeft_model(lm, config)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)")
    trainer = fit(
        model,
        examples,
        checkpoints,
        batch_size=batch_size,
        dev=dev_examples,
        save_every=options.save_steps,
        cache=cache,
        resume=resumed,
        save_total_limit=2,
        **_arguments(options),
    ).trainer
    if trainer.is_world_process_zero():
        model.save_pretrained(options.output)
        if judged is not None:
            _calibrate(model, judged, options, cache)
    fitted = config.temperature == "auto" and model.qpeft_config.temperature != "auto"
    note = f" (its loss has the temperature {model.qpeft_config.temperature:g}, which fits the LM)" if fitted else ""
    say(f"wrote the adapter to {options.output}{note}")
    trainer.accelerator.end_training()  # a process group that is left to the interpreter's exit can abort the process


def _kept_back(options: TrainOptions, examples: list) -> tuple[Judged, list]:
    """Return queries to calibrate on, and the examples of all others."""
    from .. import formats
    from ..ranking.judged import Judged, draw_judged

    count = min(_MOST_KEPT_BACK, max(_FEWEST_KEPT_BACK, len(examples) // 10))
    if len(examples) < 2 * count:
        raise ValueError(
            f"--calibrate keeps {count} queries back, and there are {len(examples)} training examples; leave it "
            "out and use qpeft calibrate with other queries"
        )
    collection = formats.open_collection(options.data) if options.data is not None else None
    split = collection.choose_split(options.split) if collection is not None and collection.splits else None
    if collection is None or collection.has("examples", split):
        drawn = set(random.Random(options.seed).sample(range(len(examples)), count))
        kept = [example for place, example in enumerate(examples) if place in drawn]
        place = options.data or options.train or ""
        judged = Judged.of_examples(f"kept-back examples of {Path(place).name}", kept)
    else:
        assert options.data is not None
        judged = draw_judged(options.data, split, count, _CANDIDATES, options.run, options.seed)
    asked = set(judged.queries)
    rest = [example for example in examples if example["query"] not in asked]
    say(f"{len(judged.queries)} queries are kept back to calibrate on")
    return judged, rest


def _calibrate(model: QPeftModel, judged: Judged, options: TrainOptions, cache: DocumentCache | None) -> None:
    """Fit relevances to the queries that were kept back, and store them in the adapter."""
    from ..adapters.files import save_calibration
    from ..ranking.reranker import Reranker

    reranker = Reranker(model, cache=cache, truncate_queries=options.truncate_queries)
    try:
        calibration = reranker.calibrate(judged.queries, judged.documents, judged.relevant, judged.name)
    except ValueError as error:
        say(f"the adapter is not calibrated: {error}")  # it is worth more than its calibration
        return
    save_calibration(options.output, calibration)
    say(calibration.describe())


def _settings(options: TrainOptions) -> dict[str, Any]:
    """Return the options of `QPeftConfig` that are given, directly or by --option, which wins."""
    settings: dict[str, Any] = {
        "clues": options.clues,
        "rank": "auto" if options.rank is None else options.rank,
        "loss": options.loss,
        "margin": options.margin,
        "queries_per_group": options.queries_per_group,
        "num_hard_negatives": options.num_negatives,
        "max_query_tokens": options.max_query_tokens,
        "max_document_tokens": options.max_document_tokens,
        "seed": options.seed,
    }
    settings |= {name: value for name in ("template", "score") if (value := getattr(options, name)) is not None}
    given = parse_options(options.option or [])
    settings |= _of_the_clues((settings | given)["clues"], options.k, options.num_heads)
    if options.generated_lora_rank is not None:
        settings["generated_lora_rank"] = options.generated_lora_rank or None
    if "generated_lora_rank" in given:  # --option sets this one field, and target_modules keeps its own default
        settings["target_modules"] = None
    return settings | given


def _config(settings: dict[str, Any], examples: list | None = None) -> QPeftConfig:
    """Return the recommended config with these settings. Raises: ValueError if there is nothing to train."""
    from ..config import QPeftConfig
    from ..training.examples import lacking_negatives

    config = QPeftConfig.recommended(examples, **settings)
    trained = config.num_virtual_tokens, config.generated_lora_rank, config.score == "both" or None
    if config.clues == "none" and not any(trained):
        raise ValueError(
            "--clues none is UPR, which has nothing to train: use qpeft rerank --upr, or add "
            "--generated-lora-rank 16 or a soft prompt, --option num_virtual_tokens=20"
        )
    if examples is not None:
        if not (config.in_batch_negatives or "in_batch_negatives" in settings):
            say("no in-batch negatives: every query has enough of its own")
        lacking_negatives(examples, config)
    return config


def _arguments(options: TrainOptions) -> dict[str, Any]:
    """Return the arguments of `fit` that are options of the same meaning."""
    return {
        "learning_rate": options.learning_rate,
        "max_steps": options.max_steps,
        "warm_up": options.warm_up,
        "seed": options.seed,
        "deterministic": options.deterministic,
        "truncate_queries": options.truncate_queries,
        "num_train_epochs": options.epochs,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "weight_decay": options.weight_decay,
        "lr_scheduler_type": options.scheduler,
        "max_grad_norm": options.max_grad_norm,
        "report_to": options.report_to,
    }


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


def _batch_size(asked: int | None, group: int) -> int:
    """Return the queries of a batch. Raises: ValueError if they are not a whole number of groups."""
    if asked is not None and (asked < 1 or asked % group):
        raise ValueError(
            f"--batch-size must be a multiple of --queries-per-group, {group}, got {asked}: queries that "
            f"share their documents are read together; --gradient-accumulation adds up batches"
        )
    return group if asked is None else asked


def _read(options: TrainOptions) -> tuple[list, list | None]:
    """Return the training examples and, if asked for, those for evaluation."""
    from .. import formats
    from ..ranking.first_stage import first_stage

    dev_examples = formats.read_examples(options.dev) if options.dev else None
    if options.data is None:
        assert options.train is not None, "checked before"
        examples = formats.read_examples(options.train)
        say(f"{len(examples)} training examples")
        return examples, dev_examples
    collection = formats.open_collection(options.data)
    name = collection.choose_split(options.split) if collection.splits else None
    if collection.has("examples", name):
        examples = list(collection.examples(name))
        left_out = "".join(f"; {count} {what} left out" for what, count in collection.left_out.items() if count)
        say(f"{len(examples)} training examples{left_out}")
        return examples, dev_examples
    qrels, corpus, queries = collection.qrels(name), collection.corpus, collection.queries(name)
    asked = {query_id: queries[query_id] for query_id in qrels if query_id in queries}
    # relevant candidates are no negatives, so more than `depth` may be needed to find `depth` others
    depth = options.depth + max(map(len, qrels.values()))
    candidates, _ = first_stage(collection, name, asked, options.run, depth, options.ignore_identical_ids)
    examples, counts = formats.training_examples(
        queries,
        qrels,
        candidates,
        corpus,
        num_negatives=options.num_negatives,
        depth=options.depth,
        seed=options.seed,
    )
    say(str(counts))
    return examples, dev_examples


def _has_checkpoint(output: Path) -> bool:
    from ..training.checkpoints import last_complete

    return last_complete(output / CHECKPOINTS)[0] is not None


def _check_output(output: Path, resume: bool, overwrite: bool, resumed: bool) -> None:
    """Check before hours of training that the adapter can be saved.

    Args:
        resumed: whether ``resume`` found a checkpoint.
    """
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
