"""``qpeft distill``: train an adapter on the scores of another reranker."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import LM_NAMES, dtype_of_job, expect_names, from_dataclass, parse_options
from .train import one_at_a_time, train
from .train_options import TrainOptions, check_options

if TYPE_CHECKING:
    from ..config import QPeftConfig
    from ..ranking.systems import SystemsSpec

SCORES = "teacher_scores.jsonl"


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """Options of the teacher, which come first in the help."""

    teacher: Annotated[
        str,
        typer.Option(
            help="The reranker to learn from: the folder or Hub id of an adapter, or of an LM that is a reranker "
            "itself (Qwen3-Reranker, …)."
        ),
    ]
    teacher_base_model: Annotated[
        str | None,
        typer.Option(help=f"The LM of a teacher that is an adapter: {LM_NAMES}.  [default: the one that it names]"),
    ] = None
    teacher_revision: Annotated[
        str | None,
        typer.Option(
            help="Branch, tag or commit of the teacher's LM on the Hub.  [default: the adapter's, or its main branch]"
        ),
    ] = None
    teacher_template: Annotated[
        str | None,
        typer.Option(
            help="Template of a teacher without an adapter, as for qpeft rerank --template.  [default: that of the "
            "reranker which the LM is]"
        ),
    ] = None
    teacher_option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE for any option of QPeftConfig, for a teacher without an adapter; may be repeated."
        ),
    ] = None
    teacher_scores: Annotated[
        Path | None,
        typer.Option(
            help=f"File for the training examples with the teacher's scores, JSON lines.  [default: {SCORES} in "
            "--output]"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DistillOptions(TrainOptions, TeacherOptions):
    """Options of ``qpeft distill``: those of ``qpeft train``, and the teacher."""

    loss: Annotated[
        str, typer.Option(help="margin_mse or kl_divergence, which learn from the scores of a teacher.")
    ] = "margin_mse"


@from_dataclass(DistillOptions)
@one_at_a_time
def command(options: DistillOptions) -> None:
    """Train an adapter on the scores of another reranker.

    The teacher scores all documents of the training examples once; after an interruption the same command goes on.
    Then an adapter is trained as by qpeft train, which may read documents before queries where the teacher has the
    query first. It answers as the teacher does, unless --score says otherwise.

    Example: qpeft distill --teacher Qwen/Qwen3-Reranker-0.6B --base-model Qwen/Qwen3-Reranker-0.6B --data FOLDER
    --output ADAPTER --clues none --lora-rank 16 --learning-rate 2e-4
    """
    from ..config.values import DISTILLATION
    from ..lm.loading import quiet_transformers
    from ..utils.files import expect_no_input

    check_options(options)
    expect_names(
        teacher=options.teacher,
        teacher_base_model=options.teacher_base_model,
        teacher_revision=options.teacher_revision,
    )
    if options.loss not in DISTILLATION:
        raise ValueError(
            f"--loss must be one of {', '.join(DISTILLATION)}, which learn from the teacher's scores, got "
            f"{options.loss!r}; qpeft train has the others"
        )
    file = options.teacher_scores or options.output / SCORES
    for path in (file, _scores_of("dev", file)):
        expect_no_input(path, options.train, options.dev, options.run, options.data, option="--teacher-scores")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"qpeft distill runs in one process; on several GPUs: qpeft train --train {file} --loss {options.loss}"
        )
    quiet_transformers()
    teacher = _teacher(options)
    train(options, _answer_of(teacher.config, options.score), functools.partial(_teach, options, teacher, file))


def _teacher(options: DistillOptions) -> SystemsSpec:
    """Return the description of the teacher. Raises: ValueError if it is no reranker."""
    from ..ranking.systems import SystemsSpec

    given: dict[str, Any] = {
        "data": "",
        "revision": options.teacher_revision,
        "template": options.teacher_template,
        "options": parse_options(options.teacher_option or (), "--teacher-option"),
        "dtype": dtype_of_job(options.dtype, options.device),
        "attention": options.attention,
        "max_query_tokens": options.max_query_tokens,
        "max_document_tokens": options.max_document_tokens,
        "truncate_queries": options.truncate_queries,
    }
    if not _is_adapter(options.teacher, options.teacher_revision):
        if options.teacher_base_model is not None:
            raise ValueError(f"--teacher-base-model is for an adapter, and {options.teacher} is an LM; leave it out")
        spec = SystemsSpec(base_model=options.teacher, **given)
    elif options.teacher_option or options.teacher_template:
        flag = "--teacher-option" if options.teacher_option else "--teacher-template"
        raise ValueError(f"{flag} is for a teacher without an adapter; leave it out")
    else:
        spec = SystemsSpec(model=options.teacher, base_model=options.teacher_base_model, **given)
    with _errors_of_the_teacher():
        spec.config  # noqa: B018  # which is made, and checked, when it is first asked for
    return spec


@contextmanager
def _errors_of_the_teacher() -> Iterator[None]:
    """A context whose errors are of the teacher, and name its own options."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise type(error)(f"--teacher: {str(error).replace('--base-model', '--teacher-base-model')}") from None


def _is_adapter(name: str, revision: str | None) -> bool:
    """Tell whether a name is that of an adapter; what is no LM is taken for one."""
    from ..adapters.files import CONFIG
    from ..lm.loading import load_config

    if os.path.isdir(name):
        return os.path.isfile(os.path.join(name, CONFIG))
    for of in dict.fromkeys((revision, None)):  # an LM that lacks the revision is an LM nevertheless
        try:
            load_config(name, revision=of)
        except (OSError, ValueError):
            continue
        return False
    return True


def _answer_of(teacher: QPeftConfig, score: str | None) -> dict[str, Any]:
    """Return the options of a config that make it answer as the teacher does, unless another score is asked for."""
    from ..config.values import ANSWER

    if score not in (None, teacher.score):
        return {}
    return {name: getattr(teacher, name) for name in ANSWER if teacher.is_set(name)}


def _teach(options: DistillOptions, teacher: SystemsSpec, file: Path, examples: list, part: str) -> list:
    """Add the teacher's scores to training or dev examples, from a file where they are there already."""
    from ..ranking.teacher import teach

    with _errors_of_the_teacher():
        teacher.prompt()  # its LM is found
    return teach(teacher, options.device, examples, _scores_of(part, file), overwrite=options.overwrite)


def _scores_of(part: str, file: Path) -> Path:
    """Return the file of the teacher's scores of "train" or "dev"; ``file`` is that of "train"."""
    return file if part == "train" else file.with_name(f"{part}_{file.name}")
