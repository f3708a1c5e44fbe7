"""The comparison as one HTML page: tables, plots, what the methods are, and what the results were made with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..evaluation.html_page import render_page
from ..utils.words import counted
from .figures import cost_figures, mean_figure, varied_figures
from .plan import Plan
from .sections import describe_methods, sections
from .tables import CollectionTable

if TYPE_CHECKING:
    from markupsafe import Markup


def html(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    """Return the whole page. Raises: ImportError without matplotlib."""
    collections = []
    for table in tables:
        figures: dict[str, list[Markup]] = {}
        if table.num_queries[table.measures[0]]:  # otherwise there is nothing to plot
            figures["Quality"] = [mean_figure(table)]
            figures["Cost"] = [*cost_figures(table), *varied_figures(plan, table)]
        parts = [(section, figures.get(section.heading, ())) for section in sections(table)]
        collections.append((table.collection, parts))
    return render_page(
        Path(__file__).with_name("comparison.html"),
        title=plan.title or "Comparison",
        lead=_lead(plan, tables),
        collections=collections,
        methods=describe_methods(plan),
        setting=_setting(plan, tables),
    )


def _lead(plan: Plan, tables: Sequence[CollectionTable]) -> str:
    seeds = f"{len(plan.seeds)} seeds" if len(plan.seeds) > 1 else "one seed"
    return (
        f"{counted(len(plan.methods), 'methods')} on {counted(len(tables), 'collections')}, {seeds} for what is "
        "trained. All rerank the same candidates of the same first stage with the same LM, prompt and truncation."
    )


def _setting(plan: Plan, tables: Sequence[CollectionTable]) -> list[tuple[str, str]]:
    results = [result for table in tables for result in table.results]
    pairs = [
        ("language model", f"{plan.lm}{f', {plan.dtype}' if plan.dtype else ''}"),
        ("options of all methods", ", ".join(f"{k} {v}" for k, v in plan.options.items()) or "the defaults"),
        ("seeds", ", ".join(map(str, plan.seeds))),
    ]
    for name, collection in plan.collections.items():
        parts = [
            f"{collection.data}, split {collection.split or 'by default'}, {collection.candidates} candidates of "
            f"{collection.run or 'BM25'}"
        ]
        for what in ("train", "synthetic", "dev"):
            part = getattr(collection, what)
            parts += [f"{what}: {part.examples or f'{part.data}, split {part.split}'}"] if part else []
        pairs.append((name, "; ".join(parts)))
    for key in ("commit", "date"):
        pairs.append((key, ", ".join(sorted({str(result.get(key) or "unknown") for result in results}))))
    for key in ("versions", "machine"):
        texts = sorted({", ".join(f"{k} {v}" for k, v in result.get(key, {}).items()) for result in results})
        pairs.append((key, "; or ".join(texts)))
    return pairs
