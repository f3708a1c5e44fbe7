"""The results of a plan, each in a folder of its own, and the names of the files in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..utils.small_files import read_json
from .methods import FIRST_STAGE
from .plan import BASELINE_NAME, Method, Plan, file_name

SETTINGS, RESULT, RUN, DEV_RUN = "settings.json", "result.json", "run.trec.gz", "dev.trec.gz"
MAX_RESULT = 64 << 20  # bytes; values of five measures for 100,000 queries take 15 MB
ADAPTER, TRAINED, CHECKPOINTS = "adapter", "trained.json", "checkpoints"


@dataclass(frozen=True)
class Cell:
    """One result: a method on a collection with a seed.

    Attributes:
        output: folder of all results.
        collection: name of the collection.
        method: the method.
        seed: the seed.
    """

    output: Path
    collection: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        """Name of the result in messages."""
        return f"{self.collection}, {self.method.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of its files."""
        return self.output / file_name(self.collection) / file_name(self.method.name) / f"seed-{self.seed}"

    def read(self, name: str = RESULT) -> dict[str, Any] | None:
        """Read a JSON file of the result; None if there is none, or if it is not complete."""
        try:
            found = read_json(self.folder / name, MAX_RESULT, nan=True)
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None


def cells(plan: Plan, output: Path) -> Iterator[Cell]:
    """Yield all results of a plan in the order in which they are made: fusions after the methods that they take."""
    first = first_stage_method(plan)
    for collection in plan.collections:
        methods = {first.name: first} | plan.methods_of(collection)
        for method in sorted(methods.values(), key=lambda method: method.of is not None):
            for seed in plan.seeds_of(method):
                yield Cell(output, collection, method, seed)


def first_stage_method(plan: Plan) -> Method:
    """Return the first stage, which is a row of every table; the plan may give it a name."""
    named = [method for method in plan.methods.values() if method.method == FIRST_STAGE]
    return named[0] if named else Method(FIRST_STAGE, BASELINE_NAME)
