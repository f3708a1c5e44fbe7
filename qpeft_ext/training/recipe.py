"""Settings that `qpeft train` chooses from the data."""

from __future__ import annotations

ENOUGH_NEGATIVES = 7


def _of_the_clues(clues: str, k: int | None, num_heads: int | None) -> dict[str, int]:
    """Raises: ValueError for an option of another kind of clues, which would do nothing."""
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


def _have_negatives(examples: list, asked: int) -> bool:
    """Whether the group's other documents can be left out: beside 7 hard negatives they brought nothing, for 2.3 times
    the time (`benchmarks/quality/NOTES.md`, ablations)."""
    fewest = min((len(example.get("negatives", ())) for example in examples), default=0)
    return min(asked, fewest) >= ENOUGH_NEGATIVES


def _generated_lora(rank: int | None, settings: dict) -> dict:
    """Beside clues it is the default, since both together rank best (`benchmarks/quality/NOTES.md`)."""
    if "generated_lora_rank" in settings:  # an --option
        return {}
    if rank is None:
        alone = settings["clues"] == "none" or settings["loss"] == "pointwise" or settings.get("compat") == "official"
        rank = 0 if alone else 16
    return {"generated_lora_rank": rank, "target_modules": ("all-linear",)} if rank else {}
