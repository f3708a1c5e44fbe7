"""Sentences below the tables of a comparison: what a reader must know beside the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..utils.words import counted
from .methods import FIRST_STAGE, UPR
from .tables import FROM_INDEX, CollectionTable

SIGNIFICANT = 0.05
MARKS = {FIRST_STAGE: "†", UPR: "‡"}
COST_NOTES = (
    "Peak memory is what the work needed beyond what was in use before it: on a CPU resident memory of the process "
    "(Linux's high-water mark), on CUDA the allocator's. That of ranking includes the document prefixes that are kept, "
    "up to the plan's cache_bytes.",
    "Documents per s: wall time of ranking with nothing computed before, reading included. "
    "Queries per PetaFLOP (E2R-FLOPs, arXiv 2507.06223): queries with all their candidates per 10¹⁵ floating-point "
    "operations of the LM, from the tokens that it read; clue modules are not counted.",
)


def quality_notes(table: CollectionTable) -> list[str]:
    """Return how the means were computed and tested, and what is missing in them."""
    lines = ["Mean over queries"]
    if any(row.expected > 1 for row in table.rows):
        lines[0] += " ± standard deviation over the seeds (of methods that are trained)"
    counts = sorted(set(table.num_queries.values()), reverse=True)
    if len(counts) > 1:
        lines[0] += "; queries averaged: " + ", ".join(f"{m} {n}" for m, n in table.num_queries.items())
    else:
        lines[0] += f"; {counted(counts[0] if counts else 0, 'queries')}"
    if any(name.startswith("CandidateRecall") for name in table.measures):
        lines.append(
            "CandidateRecall@k, recall as the paper's code counts it: relevant documents among the first "
            "k ÷ those among all candidates, over queries that have one."
        )
    for kind, name in table.baselines.items():
        tested = sum(kind in row.against for row in table.rows)
        lines.append(
            f"{MARKS[kind]} differs from {name}: paired t-test on per-query means over the seeds, "
            f"p < {SIGNIFICANT}, {f'Holm-corrected for {tested} methods' if tested > 1 else 'one method'}."
        )
    for row in table.rows:
        if row.seeds < row.expected:
            have = "has" if row.seeds == 1 else "have"  # fewer than those expected, of which there are two or more
            lines.append(f"{row.name}: {row.seeds} of {row.expected} seeds {have} a result.")
    return [*lines, *_short_trainings(table), *_fusion_weights(table)]


def _short_trainings(table: CollectionTable) -> list[str]:
    """Return the methods that the collection has too few training queries for."""
    asked = {row.name: row.method.training.queries for row in table.rows}
    short = {}
    for row in table.rows:
        for result in table.results:
            there = result.get("training", {}).get("queries")
            if result["method"] == row.name and there is not None and there < asked[row.name]:
                short[row.name] = there
    return [f"{name}: trained on {counted(n, 'queries')}, all that the collection gives." for name, n in short.items()]


def _fusion_weights(table: CollectionTable) -> list[str]:
    fused = [
        f"{result['method']} (seed {result['seed']}): {', '.join(f'{w:.2f}' for w in result['fusion']['weights'])} on "
        f"{counted(result['fusion']['dev_queries'], 'dev queries')}"
        for result in table.results
        if "fusion" in result
    ]
    return [f"Weights of the method and of the first stage: {'; '.join(fused)}."] if fused else []


def cost_notes(table: CollectionTable) -> list[str]:
    """Return what the costs count and, where results come from several machines, which are from which."""
    notes, ranked = list(COST_NOTES), [result for result in table.results if "ranking" in result]
    indexed = [r for r in ranked if r["ranking"].get(FROM_INDEX) or r.get("training", {}).get(FROM_INDEX)]
    if indexed:
        notes.append(
            f"Read prefixes from an index or other methods' files, so that no times are given: {_named(indexed)}."
        )
    on: dict[str, list[dict]] = {}
    for result in ranked:
        on.setdefault(_machine(result.get("machine", {})), []).append(result)
    if len(on) > 1:
        notes.append("Times and memory are of several machines, so compare them within one.")
        notes += [f"On {machine}: {_named(results)}." for machine, results in on.items()]
    return notes


def _named(results: Sequence[Mapping[str, Any]]) -> str:
    seeds: dict[str, list[str]] = {}
    for result in results:
        seeds.setdefault(result["method"], []).append(str(result["seed"]))
    return "; ".join(f"{name} (seed {', '.join(of_name)})" for name, of_name in seeds.items())


def _machine(facts: Mapping[str, str]) -> str:
    """Return the GPU of `utils.environment.machine` or, without one, the processor."""
    gpu = facts.get("cuda", "")
    return gpu.split(", sm_")[0] if ", sm_" in gpu else facts.get("cpu", "an unknown machine").split(";")[0]
