"""Options that several commands have, and how options are read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer

from ..utils.words import did_you_mean

Options = TypeVar("Options")

Device = Annotated[str | None, typer.Option(help="Such as cuda or cpu.  [default: cuda if there is one]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Number format of the LM: bfloat16, float16, float32, int8 (CPUs only), or auto for float32 or bfloat16, "
        "whichever this machine multiplies faster.  [default: as it is stored]"
    ),
]
KvDtype = Annotated[
    str | None,
    typer.Option(
        help="Number format in which keys and values of documents are stored: float32, bfloat16, float16 or int8.  "
        "[default: the LM's, or an index's]"
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of an LM on the Hub.  [default: its main branch]")
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Attention implementation of transformers for the LM: sdpa, flash_attention_2, flex_attention, eager, …  "
        "[default: sdpa where the LM has it]"
    ),
]
IgnoreIdenticalIds = Annotated[
    bool,
    typer.Option(
        "--ignore-identical-ids", help="Leave out documents that have the id of their query, as needed for ArguAna."
    ),
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        help="One or several names of ir_measures (nDCG@10 MAP RR@10) or trec_eval (map).  [default: nDCG@10 "
        "RR@10 Success@{1,5,20}]"
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Template of the prompt without an adapter: qpeft, upr (as it was published), chat (the LM's own chat "
        "template), that of a reranker (qwen3_reranker, mxbai_rerank, flag_reranker, pair), or a file of Jinja2.  "
        "[default: the adapter's, that of the reranker which the LM is, or qpeft]"
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        help="Any option of QPeftConfig as NAME=VALUE, for an LM that is a reranker itself: instruction, yes_words, "
        "no_words, …; may be repeated."
    ),
]
SpecialTokens = Annotated[
    str | None,
    typer.Option(
        help="Special tokens before the prompt without an adapter: those of the tokenizer, or always bos.  [default: "
        "the adapter's, or tokenizer]"
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume",
        help="Resume OUTPUT.part, which an interrupted run of the same job left, or start over.",
    ),
]
Passages = Annotated[
    str | None,
    typer.Option(
        help="Split long documents into passages, and take the best one's score (max), the mean, or the first one's "
        "(first).  [default: long documents are cut]"
    ),
]
PassageTokens = Annotated[
    int | None, typer.Option(help="Longest passage in tokens, with the title.  [default: --max-document-tokens]")
]
PassageStride = Annotated[
    int | None,
    typer.Option(help="Tokens from one passage to the next; fewer make them overlap.  [default: --passage-tokens]"),
]
DATA = "Data set: a folder or file of any known format, or an id of ir_datasets or the Hub (see docs/formats.md)."
SPLIT = "Split of the data set.  [default: test, or the only one]"
RUN_OUTPUT = "TREC run to write; compressed if its name ends in .gz."
LM_NAMES = "a folder, a Hub id, a .gguf file, or package:NAME for the GGUF file in a Python package"
LM = f"The LM: {LM_NAMES}.  [default: the one that the adapter names]"
TRUNCATE_QUERIES = "Cut longer queries at their end, instead of stopping with an error."
DETERMINISTIC_SCORES = "Make scores bit-equal whatever is scored with them; slower."


def from_dataclass(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a command of a function whose one argument is a dataclass; the fields are the command's options."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(options(**given))

        hints = get_type_hints(options, include_extras=True)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(cast(Any, options))
        ]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
        command.__annotations__ = hints
        return command

    return decorate


def dtype_of_job(dtype: str | None, device: str | None) -> str | None:
    """Return the name of a dtype: instead of auto the one that it stands for, so that a resumed job keeps it."""
    if dtype != "auto":
        return dtype
    from ..lm.compute_dtype import fastest_dtype
    from ..lm.loading import default_device

    return str(fastest_dtype(default_device(device))).removeprefix("torch.")


def expect_at_least(least: int, **options: int | None) -> None:
    """Raises: ValueError that names the first option below ``least``; None is always accepted."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")


def expect_names(**names: str | None) -> None:
    """Check names of models, of which an empty one would be taken for none, and something else would run.

    Raises: ValueError that names the first empty option; None is always accepted.
    """
    for option, value in names.items():
        if value is not None and not value.strip():
            raise ValueError(f"--{option.replace('_', '-')} is empty; give a name (is a variable of the shell unset?)")


def expect_paths(command: Callable[..., None], arguments: Sequence[str]) -> None:
    """Check paths of files and folders, of which an empty one would be the folder that this process runs in.

    Args:
        command: the function of a command.
        arguments: what it is called with.
    Raises: ValueError that names the first empty option.
    """
    hints = get_type_hints(command)
    flags = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if Path in (hint, *get_args(hint))}
    for flag, value in zip(arguments, [*arguments[1:], "-"], strict=True):
        flag, equals, after = flag.partition("=")
        if flag in flags:
            expect_names(**{flag[2:]: after if equals else value})


def expect_kv_dtype_of(kv_dtype: str | None, *caches: object) -> None:
    """Check --kv-dtype.

    Args:
        kv_dtype: its value.
        caches: the options that ask for a cache, where this one has an effect.
    Raises: ValueError for an unknown dtype, and for one without a cache.
    """
    from ..prefixes.dtypes import expect_kv_dtype

    expect_kv_dtype(kv_dtype, "--kv-dtype")
    if kv_dtype and not any(caches):
        raise ValueError("--kv-dtype does nothing without --cache-bytes or --index, where keys and values are stored")


def parse_options(given: Sequence[str], flag: str = "--option") -> dict[str, Any]:
    """Return options of `QPeftConfig` from texts NAME=VALUE; a value is JSON, else a plain text; names are "a,b".

    Args:
        given: the texts.
        flag: the option of the command that they were given by.
    Raises: ValueError for a text without "=" or an unknown name.
    """
    from ..config import QPeftConfig

    fields = {field.name: field for field in dataclasses.fields(QPeftConfig)}
    options: dict[str, Any] = {}
    for name, value in split_options(given, flag):
        if name not in fields:
            raise ValueError(f"QPeftConfig: unknown option {name!r}{did_you_mean(name, fields)}")
        options[name] = option_value(value, str(fields[name].type).startswith("tuple"))
    return options


def split_options(given: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """Return names and values of texts NAME=VALUE.

    Args:
        given: the texts.
        flag: the option of the command that they were given by.
    Raises: ValueError for a text without "=".
    """
    for text in given:
        if "=" not in text:
            raise ValueError(f"{flag} must be NAME=VALUE, got {text!r}")
    return [(name.strip(), value.strip()) for name, _, value in (text.partition("=") for text in given)]


def option_value(text: str, is_names: bool) -> Any:
    """Return the value that a text means; names are separated by commas, and "true" may be one."""
    if is_names and not text.startswith("[") and text not in ("null", "None"):
        return tuple(text.split(","))
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except json.JSONDecodeError:
        return text


def spread_measures(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--measures A B`` as ``--measures A --measures B``, for all measures up to the next option.

    Raises: ValueError for a word that is both a measure and a file, since either could be meant.
    """
    spread: list[str] = []
    asked = False
    for place, argument in enumerate(arguments):
        if argument.startswith("-"):
            asked = argument.partition("=")[0] == "--measures"
        elif asked and arguments[place - 1] != "--measures":
            from ..evaluation.measures import is_measure

            if is_measure(argument):
                if os.path.exists(argument):
                    raise ValueError(f"{argument} is a measure and also a file here; write ./{argument} for the file")
                spread.append("--measures")
        spread.append(argument)
    return spread


def measure_names(names: list[str] | None) -> list[str]:
    """Return one name per item, from options that may have several; commas within brackets belong to a measure."""
    from ..evaluation.measures import DEFAULT_MEASURES

    return [name for text in names or DEFAULT_MEASURES for name in re.findall(r"(?:[^\s,()]|\([^()]*\))+|[()]", text)]
