"""`SectionedCommand`, which checks whole numbers, and helps with a title above each group of options."""

from __future__ import annotations

from typing import Any

import typer.core

from ..utils.text import shorten

_LARGEST = 2**63 - 1  # of the integers of torch and numpy

# command -> first option of a group, in the order of the help -> title; what comes before stays below "Options"
_TRAIN = {
    "data": "Training examples",
    "clues": "What is trained",
    "template": "Prompt, score and loss",
    "learning_rate": "Steps",
    "max_query_tokens": "Lengths and batches",
    "calibrate": "Calibration, checkpoints and interruptions",
    "cache_bytes": "Prefixes that are kept, and equal bits",
    "report_to": "LM, device and everything else",
}
SECTIONS: dict[str, dict[str, str]] = {
    "train": _TRAIN,
    "distill": _TRAIN,
    "rerank": {
        "run": "Candidates",
        "upr": "Comparison and evaluation",
        "revision": "LM, devices and interruptions",
        "cache_bytes": "Memory and passes",
        "template": "Prompt",
        "max_query_tokens": "Lengths and passages",
    },
    "serve": {
        "host": "Address and access",
        "index": "Documents and memory",
        "dtype": "LM and prompt",
        "max_query_tokens": "Limits of texts and passes",
        "max_documents": "Limits of requests",
        "engine": "Replicas and log",
    },
    "synthesize": {
        "documents": "Writing",
        "max_query_tokens": "Filters",
        "num_negatives": "Negatives",
        "seed": "LM, device and interruptions",
    },
}


class SectionedCommand(typer.core.TyperCommand):
    """A command whose options stand in the groups of `SECTIONS`, if it has any there."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Raises: ValueError for a whole number that no library takes."""
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            if isinstance(value, int) and abs(value) > _LARGEST:
                bound = f"at most {_LARGEST}" if value > 0 else f"at least {-_LARGEST}"
                raise ValueError(f"{parameter.opts[0]} must be {bound}, got {shorten(value)}")
        return super().invoke(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        titles = SECTIONS.get(self.name or "")
        if titles is None:
            return super().format_options(ctx, formatter)
        title, rows = "Options", {"Options": []}  # type: tuple[str, dict[str, list[tuple[str, str]]]]
        for parameter in self.get_params(ctx):
            title = titles.get(parameter.name or "", title)
            record = parameter.get_help_record(ctx)
            if record is not None:  # --help, the last one, is with the first options
                rows.setdefault("Options" if parameter.name == "help" else title, []).append(record)
        for title, records in rows.items():
            with formatter.section(title):
                formatter.write_dl(records)
