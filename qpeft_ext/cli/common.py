"""What several commands share: options, printing, and reading of a collection with its first stage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..utils.words import did_you_mean

Device = Annotated[str | None, typer.Option(help="For example cuda or cpu.  [default: cuda if there is one]")]
Dtype = Annotated[str | None, typer.Option(help="Of the LM: bfloat16, float16 or float32.  [default: as stored]")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Of the LM, one of transformers': sdpa, flash_attention_2, flex_attention, eager, …  [default: "
        "sdpa where the LM has it]"
    ),
]
IgnoreIdenticalIds = Annotated[
    bool, typer.Option("--ignore-identical-ids", help="Leave out documents with the id of their query, as in ArguAna.")
]
Measures = Annotated[
    list[str] | None,
    typer.Option(
        help="Names of ir_measures (nDCG@10 MAP RR@10) or trec_eval (map), one or several.  [default: nDCG@10 "
        "RR@10 Success@{1,5,20}]"
    ),
]


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Return options of `QPeftConfig` from texts NAME=VALUE; a value is JSON, else a plain text ("a,b" for names).

    Raises: ValueError for a text without "=" or an unknown name.
    """
    from ..config import QPeftConfig

    fields = {field.name: field for field in dataclasses.fields(QPeftConfig)}
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise ValueError(f"--option must be NAME=VALUE, got {text!r}")
        if name not in fields:
            raise ValueError(f"QPeftConfig: unknown option {name!r}{did_you_mean(name, fields)}")
        try:
            options[name] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[name] = tuple(value.split(",")) if str(fields[name].type).startswith("tuple") else value
    return options


def spread_measures(arguments: list[str]) -> list[str]:
    """``--measures A B`` as ``--measures A --measures B``: what follows, up to the next option, and is a measure.

    Raises: ValueError for a word that is both a measure and a file, since either could be meant.
    """
    spread, asked = [], False
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
