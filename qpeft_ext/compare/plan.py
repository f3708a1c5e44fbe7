"""The YAML of a comparison → checked dataclasses. A mistake is one line that names the file and the key."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from ..config import QPeftConfig
from ..evaluation.measures import DEFAULT_MEASURES, check_measures
from ..utils.small_files import read_yaml
from ..utils.text import shorten
from ..utils.words import did_you_mean
from .methods import FIRST_STAGE, PRESETS, peft_options

PACKAGED = "packaged"  # the name of the LM that the demo comes with
BASELINE_NAME = "first stage"  # of its row, where the plan gives it no other
SAME_FOR_ALL = ("max_document_tokens", "max_query_tokens")  # or methods would not see the same tokens
SET_BY_THE_PLAN = {
    "seed": "seeds",
    "num_hard_negatives": "training.negatives",
    "queries_per_group": "training.queries_per_step",
}


@dataclass(frozen=True)
class Part:
    """Where training examples or dev queries come from.

    data: collection, below the data root.  split: of it.  run: TREC run with candidates; None: the collection's own,
    else BM25's.  queries: at most so many: of dev a sample, of training what a small collection has where methods ask
    for more.  examples: jsonl with training examples, instead of data.
    """

    data: str | None = None
    split: str | None = None
    run: str | None = None
    queries: int | None = None
    examples: str | None = None


@dataclass(frozen=True)
class Collection:
    """Test queries and their candidates.

    queries: a seeded sample of so many (None: all).  candidates: the best so many of the first stage are reranked.
    train, synthetic: what methods are trained on.  dev: what weights of a fusion are chosen on.
    index: folder that ``qpeft index`` made with the plan's LM: prefixes in it are not computed.
    methods: names of its rows (None: all).
    """

    data: str
    name: str = ""
    split: str | None = None
    run: str | None = None
    queries: int | None = None
    candidates: int = 100
    train: Part | None = None
    synthetic: Part | None = None
    dev: Part | None = None
    index: str | None = None
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Training:
    """queries: training examples.  negatives: of each, drawn from its ``depth`` best candidates.  queries_per_step: of
    an optimiser step.  epochs: passes over the examples."""

    queries: int = 320
    negatives: int = 11
    depth: int = 40
    queries_per_step: int = 4
    epochs: float = 1.0


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    method: a name of `methods.PRESETS`.  options: of `QPeftConfig`.  peft: of the peft config.  learning_rate: at the
    peak of the schedule.  examples: "train" or "synthetic", a part of the collection.  of: what a fusion takes.
    varied: (name of the method, option, value) where ``vary`` made it.
    """

    method: str
    name: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    training: Training = Training()
    learning_rate: float | None = None
    examples: str = "train"
    of: str | None = None
    varied: tuple[str, str, Any] | None = None

    @property
    def preset(self):
        return PRESETS[self.method]


@dataclass(frozen=True)
class Plan:
    """A comparison.

    lm: a folder, a Hub id or "packaged".  options: of `QPeftConfig`, for all methods.  cache_bytes: memory for document
    prefixes while a method is trained, and while it ranks.  measures: the first one is plotted.  all_collections: names
    of those that were not asked for too.
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
    all_collections: tuple[str, ...] = ()

    @property
    def lm_name(self) -> str:
        from ..lm.loading import BASE_LM

        return str(BASE_LM) if self.lm == PACKAGED else self.lm

    def config(self, method: Method, seed: int) -> QPeftConfig:
        """The method's `QPeftConfig`: options of the plan, then of the preset, then its own."""
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
        """All seeds for what is trained; the first for the rest, which does not depend on one."""
        trained = (self.methods[method.of] if method.of else method).preset.trained
        return self.seeds if trained else self.seeds[:1]

    def methods_of(self, collection: str) -> dict[str, Method]:
        """The rows of a collection, and what fusions among them take."""
        asked = self.collections[collection].methods
        if asked is None:
            return self.methods
        named = {name: method for name, method in self.methods.items() if _goes_by(method, asked)}
        taken = {method.of for method in named.values()}
        return {name: method for name, method in self.methods.items() if name in named or name in taken}


def read_plan(path: Path, only: Iterable[str] = (), collections: Iterable[str] = ()) -> Plan:
    """Read and check a plan.

    Args:
        only: names of methods (those that ``vary`` makes have the name of the one it stands at); () takes all.
        collections: names of collections; () takes all.
    Raises: ValueError or OSError, one line.
    """
    given = _load(path)
    reader = _Reader(path)
    plan = reader.read("", Plan, given, path=path, collections=reader.collections, methods=reader.methods)
    chosen = {}
    merged = {
        name: replace(method, training=replace(plan.training, **_given(method.training)))
        for name, method in plan.methods.items()
    }
    plan = replace(plan, methods=merged, all_collections=tuple(plan.collections))
    for name, method in plan.methods.items():
        if not only or _goes_by(method, only):
            chosen[name] = method
    asked = [("", only), *((f"collections.{name}.methods: ", c.methods or ()) for name, c in plan.collections.items())]
    for place, names in asked:
        for name in names:
            if not any(_goes_by(method, [name]) for method in plan.methods.values()):
                raise ValueError(f"{path}: {place}there is no method {shorten(name)}{did_you_mean(name, plan.methods)}")
    for name in collections:
        if name not in plan.collections:
            raise ValueError(f"{path}: there is no collection {shorten(name)}{did_you_mean(name, plan.collections)}")
    if collections:
        plan = replace(plan, collections={name: c for name, c in plan.collections.items() if name in collections})
    for name in [method.of for method in chosen.values() if method.of]:  # a fusion needs the method that it takes
        if name in plan.methods:
            chosen.setdefault(name, plan.methods[name])
    plan = replace(plan, methods={name: method for name, method in plan.methods.items() if name in chosen})
    reader.check(plan)
    return plan


class _Reader:
    """Mappings of the file → dataclasses. Every complaint starts with the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, key: str, problem: object) -> ValueError:
        key, problem = (text if len(text) <= 160 else f"{text[:159]}…" for text in (key, str(problem)))
        return ValueError(f"{self.path}: {key + ': ' if key else ''}{problem}")

    def read(self, key: str, kind: type, given: object, base: object = None, **readers: Any):
        """A dataclass from a mapping. ``base``: has the defaults.  readers: of fields that are more than plain values,
        or the values themselves."""
        if not isinstance(given, Mapping):
            raise self.error(key, f"expected keys and values, got {shorten(given)}")
        fields, hints = {f.name: f for f in dataclasses.fields(kind)}, get_type_hints(kind)
        hidden = {"varied", "path", "all_collections"} | ({"name"} if kind is not Part else set())
        known = [name for name in fields if name not in hidden]
        values: dict[str, Any] = {} if base is None else dict(vars(base))
        for name, value in given.items():
            where = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise self.error(where, f"unknown key{did_you_mean(name, known)}; expected {', '.join(known)}")
            reader = readers.get(name)
            values[name] = reader(where, value) if callable(reader) else self._value(where, hints[name], value)
        values |= {name: reader for name, reader in readers.items() if not callable(reader)}
        for name, f in fields.items():
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if needed and name not in values:
                raise self.error(key, f"the key {shorten(name)} is missing")
        return kind(**values)

    def _value(self, where: str, hint: Any, value: object) -> Any:
        """The value of a field, of the type that its annotation names."""
        hint = str(hint).replace("<class '", "").replace("'>", "")
        if value is None and "None" in hint:
            return None
        if hint.endswith("Training"):
            return self.read(where, Training, value)
        if "Part" in hint:
            return self.part(where, value)
        if hint.startswith("dict"):
            if not isinstance(value, Mapping):
                raise self.error(where, f"expected keys and values, got {shorten(value)}")
            return dict(value)
        if hint.startswith("tuple"):
            values = value if isinstance(value, list) else [value]
            inner = int if "int" in hint else str
            if not values or not all(type(item) is inner for item in values):
                what = "whole numbers" if inner is int else "names"
                raise self.error(where, f"expected a list of {what}, got {shorten(value)}")
            return tuple(values)
        kind = {"i": int, "f": float, "s": str}[hint[0]]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is str and not value.strip()):
            raise self.error(
                where,
                f"expected {({int: 'a whole number', float: 'a number', str: 'a name'})[kind]}, got {shorten(value)}",
            )
        if (
            kind is not str
            and not (0 < value < math.inf)
            and not (value == 0 and where.endswith(("negatives", "cache_bytes")))
        ):
            raise self.error(where, f"must be above 0, got {shorten(value)}")
        return value

    def part(self, key: str, given: object) -> Part:
        part = self.read(key, Part, given)
        if (part.data is None) == (part.examples is None):
            raise self.error(key, "expected either data or examples")
        return part

    def collections(self, key: str, given: object) -> dict[str, Collection]:
        return {
            name: self.read(f"{key}.{name}", Collection, value, name=name) for name, value in self._named(key, given)
        }

    def methods(self, key: str, given: object) -> dict[str, Method]:
        found: dict[str, Method] = {}
        for name, value in self._named(key, given):
            value = dict(value) if isinstance(value, Mapping) else value
            vary = value.pop("vary", {}) if isinstance(value, dict) else {}
            base = self.read(
                f"{key}.{name}",
                Method,
                value,
                name=name,
                training=lambda where, given: self._checked_overrides(where, given),
            )
            if base.method not in PRESETS:
                raise self.error(
                    f"{key}.{name}.method",
                    f"unknown method {base.method!r}{did_you_mean(base.method, PRESETS)}; known: {', '.join(PRESETS)}",
                )
            if name == BASELINE_NAME and base.method != FIRST_STAGE:
                raise self.error(f"{key}.{name}", "is the name of the first stage's own row; choose another")
            for method in [base, *self._variants(f"{key}.{name}.vary", base, vary)]:
                for other in found:
                    if file_name(other) == file_name(method.name):
                        raise self.error(
                            f"{key}.{name}", f"{method.name!r} and {other!r} would share a folder; rename one of them"
                        )
                found[method.name] = method
        return found

    def _checked_overrides(self, where: str, given: object) -> dict:
        """What a method says about its training; joined with the plan's when that is known."""
        self.read(where, Training, given)
        return dict(given)

    def _named(self, key: str, given: object) -> list[tuple[str, object]]:
        if not isinstance(given, Mapping) or not given:
            raise self.error(key, f"expected names with keys and values below each, got {shorten(given)}")
        for name in given:
            if not isinstance(name, str) or not name.strip():
                raise self.error(key, f"expected a name, got {shorten(name)}")
        return list(given.items())

    def _variants(self, key: str, base: Method, vary: object) -> list[Method]:
        """A method for every value of every varied option, one option at a time."""
        if not isinstance(vary, Mapping):
            raise self.error(key, f"expected options with lists of values, got {shorten(vary)}")
        found = []
        for option, values in vary.items():
            if not isinstance(values, list) or not values:
                raise self.error(f"{key}.{option}", f"expected a list of values, got {shorten(values)}")
            for value in values:
                where, text = f"{key}.{option}", "+".join(map(str, value)) if isinstance(value, list) else value
                part, _, inner = str(option).rpartition(".")
                if part == "training":
                    self.read(where.rpartition(".")[0], Training, {inner: value})
                    changed: dict[str, Any] = {"training": dict(_given(base.training)) | {inner: value}}
                elif option == "learning_rate":
                    changed = {"learning_rate": self._value(where, "float", value)}
                elif part in ("", "options", "peft"):
                    which = part or "options"
                    changed = {which: getattr(base, which) | {inner: value}}
                else:
                    raise self.error(where, "expected an option of QPeftConfig, peft.…, training.… or learning_rate")
                name = f"{base.name}, {inner}={text if text not in ((), '') else 'none'}"
                found.append(replace(base, name=name, varied=(base.name, inner, value), **changed))
        return found

    def check(self, plan: Plan) -> None:
        """What the parts must be for each other."""
        try:
            check_measures(plan.measures)
        except ValueError as error:
            raise self.error("measures", error) from None
        if len(set(plan.seeds)) < len(plan.seeds):
            raise self.error("seeds", f"each can be given once only, got {list(plan.seeds)}")
        for option in SET_BY_THE_PLAN:
            if option in plan.options:
                raise self.error(f"options.{option}", f"is set by {SET_BY_THE_PLAN[option]}")
        for name, method in plan.methods.items():
            where = f"methods.{method.varied[0] if method.varied else name}"
            self._check_method(where, plan, method)
        for name, collection in plan.collections.items():
            part = f"collections.{name}"
            for method in plan.methods_of(name).values():
                if method.preset.trained and getattr(collection, method.examples) is None:
                    raise self.error(part, f"the key {method.examples!r} is missing; {method.name!r} is trained on it")
                if method.of and collection.dev is None:
                    raise self.error(part, f"the key 'dev' is missing; {method.name!r} chooses its weights on it")
            if collection.dev and collection.dev.examples:
                raise self.error(f"{part}.dev", "expected data: a fusion is chosen on rankings, not on examples")

    def _check_method(self, where: str, plan: Plan, method: Method) -> None:
        if method.examples not in ("train", "synthetic"):
            raise self.error(f"{where}.examples", f"expected train or synthetic, got {method.examples!r}")
        for option in (*SAME_FOR_ALL, *SET_BY_THE_PLAN):
            if option in method.options:
                belongs = SET_BY_THE_PLAN.get(option, f"options.{option} of the plan, the same for all methods")
                raise self.error(f"{where}.options.{option}", f"is set by {belongs}")
        if method.preset.trained and method.learning_rate is None:
            raise self.error(where, "the key 'learning_rate' is missing; choose it on dev")
        if (method.method == "fusion") != (method.of is not None):
            raise self.error(
                where,
                "the key 'of', the method to fuse with the first stage, belongs to method: fusion"
                + (" and is missing" if method.of is None else ""),
            )
        if method.of and getattr(plan.methods.get(method.of), "method", "fusion") in ("fusion", FIRST_STAGE):
            raise self.error(
                f"{where}.of",
                f"expected another method of the plan that is no fusion, got {method.of!r}"
                f"{did_you_mean(method.of, plan.methods)}",
            )
        if method.peft and method.preset.peft is None:
            raise self.error(f"{where}.peft", f"{method.method} has no peft config")
        try:
            plan.config(method, plan.seeds[0])
            if method.preset.peft:
                peft_options(method.preset, method.peft)
        except (TypeError, ValueError) as error:
            raise self.error(where, error) from None


def _goes_by(method: Method, names: Iterable[str]) -> bool:
    """Whether its name, or the name of the one that ``vary`` made it of, is among them."""
    return method.name in names or bool(method.varied) and method.varied[0] in names


def file_name(name: str) -> str:
    """A name as one part of a path, and as one column of a run."""
    return re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "x"


def _load(path: Path) -> dict:
    """The file as plain values. Raises: ValueError that names the line, also for a key that is given twice."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a plan with the keys lm, collections and methods, got {shorten(given)}")
    return given


def _given(training: object) -> dict:
    return training if isinstance(training, dict) else {}
