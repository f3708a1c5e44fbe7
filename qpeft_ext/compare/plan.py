"""Plans of comparisons as dataclasses: collections, methods and training.

`plan_file` reads them from YAML; their fields are the keys of the file.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..config import QPeftConfig
from ..evaluation.measures import DEFAULT_MEASURES
from .methods import PRESETS, Preset

PACKAGED = "packaged"  # the name of the packaged LM, which the demo uses too
PASSAGE_OPTIONS = ("passages", "passage_tokens", "passage_stride")
PREFIXES = "prefixes"  # folder among the results
TABLES = ("comparison.md", "comparison.csv", "comparison.json", "comparison.html")  # files among the results
BASELINE_NAME = "first stage"  # of its row, where the plan gives it no other


@dataclass(frozen=True)
class Source:
    """Where training examples or dev queries come from: a collection, or a file of examples.

    Attributes:
        data: the collection, below the data root.
        split: split of the collection; None: its only one, or its usual one.
        run: TREC run with candidates; None: the collection's own candidates, else those of BM25.
        queries: at most so many. Dev queries are sampled. For training it limits what methods ask for, in a
            collection that has fewer.
        examples: JSONL file with training examples, in place of ``data``.
    """

    data: str | None = None
    split: str | None = None
    run: str | None = None
    queries: int | None = None
    examples: str | None = None


@dataclass(frozen=True)
class Collection:
    """Test queries with their candidates, and the data that methods are trained on.

    Attributes:
        data: the collection, below the data root.
        name: its name in the plan.
        split, run: as in `Source`.
        queries: size of a seeded sample of the queries; None: all.
        candidates: how many of the first stage's best documents are reranked.
        train, synthetic: what methods are trained on.
        dev: what the weights of a fusion are chosen on.
        index: folder that ``qpeft index`` made with the plan's LM; prefixes in it are not computed again.
        methods: names of the methods that are compared on it; None: all.
    """

    data: str
    name: str = ""
    split: str | None = None
    run: str | None = None
    queries: int | None = None
    candidates: int = 100
    train: Source | None = None
    synthetic: Source | None = None
    dev: Source | None = None
    index: str | None = None
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Training:
    """How much a method is trained.

    Attributes:
        queries: number of training examples.
        negatives: negatives of each example.
        depth: number of the best candidates that negatives are drawn from.
        queries_per_step: examples of an optimiser step.
        epochs: passes over the examples.
    """

    queries: int = 320
    negatives: int = 11
    depth: int = 40
    queries_per_step: int = 4
    epochs: float = 1.0


class Varied(NamedTuple):
    """The option that ``vary`` changed in a method, and the method's name without the change."""

    name: str
    option: str
    value: Any


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        method: a name of `methods.PRESETS`.
        name: its name in the plan and in the tables.
        options: options of `QPeftConfig`.
        peft: options of the preset's peft config.
        training: how much it is trained.
        learning_rate: at the peak of the schedule; needed where the method is trained.
        examples: "train" or "synthetic": the source of a collection that it is trained on.
        of: name of the method that a fusion takes, beside the first stage.
        passages, passage_tokens, passage_stride: as for `Reranker`; documents are cut in training all the same.
        varied: set where ``vary`` made the method.
    """

    method: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    training: Training = Training()
    learning_rate: float | None = None
    examples: str = "train"
    of: str | None = None
    passages: str | None = None
    passage_tokens: int | None = None
    passage_stride: int | None = None
    varied: Varied | None = None

    @property
    def preset(self) -> Preset:
        """The method with its defaults."""
        return PRESETS[self.method]

    @property
    def passage_options(self) -> dict[str, Any]:
        """The options of `Reranker` for passages; empty without them."""
        return {name: value for name in PASSAGE_OPTIONS if (value := getattr(self, name)) is not None}

    def goes_by(self, names: Container[str]) -> bool:
        """Return whether its name, or that of the method that ``vary`` made it of, is among the names."""
        return self.name in names or self.varied is not None and self.varied.name in names


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
        path: file that the plan was read from.
        lm: the language model: a folder, an id of the Hugging Face Hub, or "packaged".
        collections, methods: by name; those that were asked for.
        title: heading of the tables.
        dtype: of the LM's weights; None: as they are stored.
        seeds: seeds of training; methods without training have one result only.
        measures: names of measures; the first one decides, and is plotted.
        options: options of `QPeftConfig` for all methods.
        training: how much methods are trained, where they do not say otherwise.
        cache_bytes: memory for the prefixes of documents, while a method is trained and while it ranks.
        disk_bytes: bytes of files in the folder of the results for prefixes, which all methods that have the plan's LM
            and prompt share; 0: none are kept.
        kv_dtype: dtype in which keys and values of prefixes are kept; None: that of the index, or else the LM's.
        all_collections: names of all collections, whether asked for or not.
    """

    path: Path
    lm: str
    collections: dict[str, Collection]
    methods: dict[str, Method]
    title: str = ""
    dtype: str | None = None
    seeds: tuple[int, ...] = (0,)
    measures: tuple[str, ...] = DEFAULT_MEASURES
    options: dict[str, Any] = field(default_factory=dict)
    training: Training = Training()
    cache_bytes: int = 0
    disk_bytes: int = 0
    kv_dtype: str | None = None
    all_collections: tuple[str, ...] = ()

    @property
    def lm_name(self) -> str:
        """Folder or id of the LM."""
        from ..lm.loading import BASE_LM

        return str(BASE_LM) if self.lm == PACKAGED else self.lm

    def config(self, method: Method, seed: int) -> QPeftConfig:
        """Return the options of a method: those of the plan, then of its preset, then its own."""
        options = self.options | method.preset.options | method.options
        return QPeftConfig.from_dict(
            options
            | {
                "seed": seed,
                "num_hard_negatives": method.training.negatives,
                "queries_per_group": method.training.queries_per_step,
            }
        )

    def seeds_of(self, method: Method) -> tuple[int, ...]:
        """Return all seeds for a method that is trained, and the first for one that does not depend on a seed."""
        trained = (self.methods[method.of] if method.of else method).preset.trained
        return self.seeds if trained else self.seeds[:1]

    def taken(self, fusion: Method, seed: int) -> tuple[Method, int]:
        """Return the method that a fusion takes, and its seed: one that is not trained has one only."""
        method = self.methods[fusion.of or ""]
        seeds = self.seeds_of(method)
        return method, seed if seed in seeds else seeds[0]

    def methods_of(self, collection: str) -> dict[str, Method]:
        """Return the methods that are compared on a collection, and what fusions among them take."""
        asked = self.collections[collection].methods
        if asked is None:
            return self.methods
        named = {name: method for name, method in self.methods.items() if method.goes_by(asked)}
        taken = {method.of for method in named.values()}
        return {name: method for name, method in self.methods.items() if name in named or name in taken}


def file_name(name: str) -> str:
    """Return a name as one part of a path, and as one column of a run."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "x"
