"""``qpeft train``: train an adapter on a data set or on a file of examples."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..utils.console import is_first_process, say
from ..utils.files import drop_temporary, private_folder
from ..utils.locks import locked_folder
from ..utils.optional import expect_packages
from ..utils.words import counted
from .common import from_dataclass
from .train_options import OF_CANDIDATES, TrainOptions, check_options, expect_none_of_data
from .train_settings import LORA, batch_size, config_of, config_settings, lora_options

if TYPE_CHECKING:
    from ..config import QPeftConfig
    from ..model import QPeftModel
    from ..prefixes.cache import DocumentCache
    from ..ranking.judged import Judged

Options = TypeVar("Options", bound=TrainOptions)
Teach = Callable[[list, str], list]

CHECKPOINTS = "checkpoints"
_FEWEST_KEPT_BACK, _MOST_KEPT_BACK = 20, 200  # queries to calibrate on
_CANDIDATES = 20  # of each of them


def one_at_a_time(command: Callable[[Options], None]) -> Callable[[Options], None]:
    """Let one process train into a folder at a time, since two would mix their checkpoints."""

    @functools.wraps(command)
    def locked(options: Options) -> None:
        output = options.output
        if not is_first_process() or output.exists() and not output.is_dir():  # `_check_output` explains that error
            return command(options)
        with locked_folder(output):
            return command(options)

    return locked


@from_dataclass(TrainOptions)
@one_at_a_time
def command(options: TrainOptions) -> None:
    """Train an adapter; the LM stays frozen.

    The clue module and the generated LoRA are trained, with --lora-rank also a LoRA in the LM, and whatever else
    --option asks for.

    On several GPUs: torchrun --nproc-per-node N -m qpeft_ext.cli train ... Each GPU reads its own group of queries, so
    a step has N times as many, and equals a step on one GPU with N times --gradient-accumulation.
    """
    train(options)


def train(options: TrainOptions, defaults: Mapping[str, Any] | None = None, teach: Teach | None = None) -> None:
    """Train an adapter.

    Args:
        options: of the command.
        defaults: options of `QPeftConfig` that the command's options win over.
        teach: adds a teacher's scores to examples; it is also given the name of what they are for, train or dev.
    """
    check_options(options)
    expect_packages("training", {"accelerate": "train"})  # now, not when data and LM have been read
    resumed = options.resume and _has_checkpoint(options.output)
    if is_first_process():
        _check_output(options.output, options.resume, options.overwrite, resumed)

    from ..lm.loading import quiet_transformers
    from ..prefixes.cache import DocumentCache

    settings = dict(defaults or {}) | config_settings(options)
    lora = lora_options(options) if options.lora_rank else None
    config = config_of(settings, lora is not None)  # a wrong option is an error before anything is read
    queries = batch_size(options.batch_size, config.queries_per_group)
    has_cache = options.cache_bytes or options.index
    cache = None
    if has_cache:
        cache = DocumentCache(options.cache_bytes, index=options.index, kv_dtype=options.kv_dtype)
    examples, dev_examples, judged, config = _prepared(options, settings, lora is not None, teach)
    quiet_transformers()
    from ..training.fit import fit

    checkpoints = options.output / CHECKPOINTS
    if options.overwrite and checkpoints.exists() and is_first_process():
        shutil.rmtree(checkpoints)  # a later --resume must not find the earlier run's
    model = _model(options, config, lora)
    trainer = fit(
        model,
        examples,
        checkpoints,
        batch_size=queries,
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


def _model(options: TrainOptions, config: QPeftConfig, lora: dict[str, Any] | None) -> QPeftModel:
    """Load the LM, and add what is trained."""
    from ..lm.loading import default_device, load_lm
    from ..lm.new_adapter import with_new_adapter
    from ..model import get_qpeft_model

    lm = load_lm(
        options.base_model,
        dtype=options.dtype,
        device=default_device(options.device),
        attention=options.attention,
        revision=options.revision,
    )
    if lora is not None:
        lm = with_new_adapter(lm, LORA, lora, options.seed)
    model = get_qpeft_model(lm, config)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"{trainable:,} of {total:,} parameters are trained ({100 * trainable / total:.2f} %)")
    return model


def _prepared(
    options: TrainOptions, settings: dict[str, Any], has_lora: bool, teach: Teach | None
) -> tuple[list, list | None, Judged | None, QPeftConfig]:
    """Return the examples to train on and to evaluate on, queries to calibrate on, and the config for the examples."""
    from ..ranking.systems import prompt_without_lm

    examples, dev_examples = _read(options)
    judged, examples = _kept_back(options, examples) if options.calibrate else (None, examples)
    config = config_of(settings, has_lora, examples)
    if teach is not None:
        prompt_without_lm(options.base_model, options.revision, config)  # an answer that the LM has not is known now
        examples = teach(examples, "train")
        dev_examples = dev_examples and teach(dev_examples, "dev")
    return examples, dev_examples, judged, config


def _kept_back(options: TrainOptions, examples: list) -> tuple[Judged, list]:
    """Return queries to calibrate on, and the examples of all others."""
    from .. import formats
    from ..ranking.judged import Judged, draw_judged

    count = min(_MOST_KEPT_BACK, max(_FEWEST_KEPT_BACK, len(examples) // 10))
    if len(examples) < 2 * count:
        raise ValueError(
            f"--calibrate keeps {count} queries back, of {counted(len(examples), 'training examples')}; leave it "
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


def _read(options: TrainOptions) -> tuple[list, list | None]:
    """Return the training examples and, if asked for, those for evaluation."""
    from .. import formats
    from ..ranking.first_stage import first_stage

    dev_examples = formats.read_examples(options.dev) if options.dev else None
    if options.data is None:
        assert options.train is not None, "checked before"
        examples = _drawn(formats.read_examples(options.train), options)
        say(counted(len(examples), "training examples"))
        return examples, dev_examples
    collection = formats.open_collection(options.data)
    name = collection.choose_split(options.split) if collection.splits else None
    if collection.has("examples", name):
        expect_none_of_data(options, f"{options.data}, whose examples have their negatives", *OF_CANDIDATES)
        examples = _drawn(list(collection.examples(name)), options)
        left_out = "".join(f"; {counted(n, what)} left out" for what, n in collection.left_out.items() if n)
        say(f"{counted(len(examples), 'training examples')}{left_out}")
        return examples, dev_examples
    corpus, queries, judged = collection.corpus, collection.queries(name), collection.qrels(name)
    qrels = {query_id: judged[query_id] for query_id in _drawn(list(judged), options)}
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


def _drawn(items: list, options: TrainOptions) -> list:
    """Return --queries of the items in their order; all where there are not more."""
    if options.queries is None or options.queries >= len(items):
        return items
    drawn = sorted(random.Random(f"{options.seed} queries").sample(range(len(items)), options.queries))
    return [items[place] for place in drawn]


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
    if any(checkpoints.glob("checkpoint-*")) and not (resume or overwrite):
        raise ValueError(f"{output} holds checkpoints of an earlier run; --resume goes on, --overwrite starts anew")
    if resume and not resumed:
        say(f"{checkpoints} has no complete checkpoint: training starts at the beginning")
    drop_temporary(output)
    with private_folder(output / "adapter"):
        pass
