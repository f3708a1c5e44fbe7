"""Plans of comparisons, read from YAML and checked. A mistake is one line that names the file and the key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection as Names
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from ..evaluation.measures import check_measures
from ..prefixes.dtypes import expect_kv_dtype
from ..prompts.passages import check_passages
from ..utils.small_files import read_yaml
from ..utils.text import shorten
from ..utils.words import did_you_mean
from .methods import FIRST_STAGE, PRESETS, peft_options
from .plan import BASELINE_NAME, PREFIXES, TABLES, Collection, Method, Plan, Source, Training, Varied, file_name

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Kind = TypeVar("Kind", bound=DataclassInstance)

SAME_FOR_ALL = ("max_document_tokens", "max_query_tokens")  # else methods would not see the same tokens
SET_BY_THE_PLAN = {
    "seed": "seeds",
    "num_hard_negatives": "training.negatives",
    "queries_per_group": "training.queries_per_step",
}
_NOT_KEYS = {Plan: {"path", "all_collections"}, Collection: {"name"}, Method: {"name", "varied"}}
_KINDS = {int: "a whole number", float: "a number", str: "a name"}
_MAY_BE_0 = ("negatives", "cache_bytes", "disk_bytes")


def read_plan(path: Path, only: Names[str] = (), collections: Names[str] = ()) -> Plan:
    """Read and check a plan.

    Args:
        path: the YAML file.
        only: names of methods; a name also stands for the methods that ``vary`` makes of it. () takes all.
        collections: names of collections; () takes all.

    Raises: ValueError or OSError, one line.
    """
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a plan with the keys lm, collections and methods, got {shorten(given)}")
    reader = _Reader(path)
    plan = reader.plan(given)
    plan = _choose(plan, only, collections)
    _Checker(reader, plan).check()
    return plan


def _choose(plan: Plan, only: Names[str], collections: Names[str]) -> Plan:
    """Take the methods and collections that are asked for, and the methods that fusions among them need."""
    asked = [("", only), *((f"collections.{name}.methods: ", c.methods or ()) for name, c in plan.collections.items())]
    for key, names in asked:
        for name in names:
            if not any(method.goes_by([name]) for method in plan.methods.values()):
                suggestion = did_you_mean(name, plan.methods)
                raise ValueError(f"{plan.path}: {key}there is no method {shorten(name)}{suggestion}")
    for name in collections:
        if name not in plan.collections:
            suggestion = did_you_mean(name, plan.collections)
            raise ValueError(f"{plan.path}: there is no collection {shorten(name)}{suggestion}")
    if collections:
        plan = replace(plan, collections={name: c for name, c in plan.collections.items() if name in collections})
    chosen = {name for name, method in plan.methods.items() if not only or method.goes_by(only)}
    chosen |= {taken for name in chosen if (taken := plan.methods[name].of) is not None}
    return replace(plan, methods={name: method for name, method in plan.methods.items() if name in chosen})


class _Reader:
    """Makes dataclasses of the mappings in a file; every error names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, key: str, problem: object) -> ValueError:
        """Return an error of one line."""
        key, problem = (text if len(text) <= 160 else f"{text[:159]}…" for text in (key, str(problem)))
        return ValueError(f"{self.path}: {key + ': ' if key else ''}{problem}")

    def plan(self, given: Mapping) -> Plan:
        """Read the whole file."""
        training = self.read("training", Training, given.get("training", {}))
        plan = self.read(
            "",
            Plan,
            given,
            path=self.path,
            collections=self._collections,
            methods=lambda key, value: self._methods(key, value, training),
        )
        return replace(plan, all_collections=tuple(plan.collections))

    def read(self, key: str, kind: type[Kind], given: object, base: Kind | None = None, **fields: Any) -> Kind:
        """Make a dataclass of a mapping.

        Args:
            key: where the mapping stands in the file.
            kind: the dataclass.
            given: what the file has there.
            base: has the values of what is not given.
            fields: values of fields that are no keys; or a function (key, value) -> value that reads a field.
        """
        known = self._keys(kind)
        values: dict[str, Any] = {} if base is None else dict(vars(base))
        hints = get_type_hints(kind)
        for name, value in self._mapping(key, given).items():
            where = f"{key}.{name}" if key else str(name)
            if name not in known:
                raise self.error(where, f"unknown key{did_you_mean(name, known)}; expected {', '.join(known)}")
            read = fields.get(name)
            values[name] = read(where, value) if callable(read) else self._value(where, hints[name], value)
        values |= {name: value for name, value in fields.items() if not callable(value)}
        for f in dataclasses.fields(kind):
            needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if needed and f.name not in values:
                raise self.error(key, f"the key {shorten(f.name)} is missing")
        return kind(**values)

    @staticmethod
    def _keys(kind: type[Kind]) -> list[str]:
        return [f.name for f in dataclasses.fields(kind) if f.name not in _NOT_KEYS.get(kind, ())]

    def _mapping(self, key: str, given: object) -> Mapping:
        if not isinstance(given, Mapping):
            raise self.error(key, f"expected keys and values, got {shorten(given)}")
        return given

    def _value(self, key: str, hint: Any, value: object) -> Any:
        """Read a field of the type that its annotation names."""
        kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            return None
        kind = kinds[0]
        if kind is Training:
            return self.read(key, Training, value)
        if kind is Source:
            return self._source(key, value)
        if get_origin(kind) is dict:
            return dict(self._mapping(key, value))
        if get_origin(kind) is tuple:
            return self._list(key, get_args(kind)[0], value)
        return self._plain(key, kind, value)

    def _list(self, key: str, kind: type, value: object) -> tuple:
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(item) is kind for item in values):
            what = "whole numbers" if kind is int else "names"
            raise self.error(key, f"expected a list of {what}, got {shorten(value)}")
        return tuple(values)

    def _plain(self, key: str, kind: type[int | float | str], value: Any) -> int | float | str:
        """Read a number above 0 or a name."""
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, str) and not value.strip()):
            raise self.error(key, f"expected {_KINDS[kind]}, got {shorten(value)}")
        if not isinstance(value, str) and not 0 < value < math.inf and not (value == 0 and key.endswith(_MAY_BE_0)):
            raise self.error(key, f"must be above 0, got {shorten(value)}")
        return value

    def _source(self, key: str, given: object) -> Source:
        source = self.read(key, Source, given)
        if (source.data is None) == (source.examples is None):
            raise self.error(key, "expected either data or examples")
        return source

    def _collections(self, key: str, given: object) -> dict[str, Collection]:
        found: dict[str, Collection] = {}
        for name, value in self._named(key, given):
            self._expect_own_folder(f"{key}.{name}", name, found)
            if file_name(name) in (PREFIXES, *TABLES):
                raise self.error(f"{key}.{name}", "is a name that the folder of results needs itself; choose another")
            found[name] = self.read(f"{key}.{name}", Collection, value, name=name)
        return found

    def _expect_own_folder(self, key: str, name: str, others: Names[str]) -> None:
        for other in others:
            if file_name(other) == file_name(name):
                raise self.error(key, f"{name!r} and {other!r} would share a folder; rename one of them")

    def _methods(self, key: str, given: object, training: Training) -> dict[str, Method]:
        """Read methods and their variants. ``training``: of the plan."""
        found: dict[str, Method] = {}
        for name, value in self._named(key, given):
            where = f"{key}.{name}"
            value = dict(self._mapping(where, value))
            vary = value.pop("vary", {})
            base = self.read(
                where,
                Method,
                {"training": {}} | value,
                name=name,
                training=lambda at, given: self.read(at, Training, given, training),
            )
            if base.method not in PRESETS:
                suggestion = did_you_mean(base.method, PRESETS)
                raise self.error(
                    f"{where}.method", f"unknown method {base.method!r}{suggestion}; known: {', '.join(PRESETS)}"
                )
            if file_name(name) == file_name(BASELINE_NAME) and base.method != FIRST_STAGE:
                raise self.error(where, "is the name, or the folder, of the first stage's own row; choose another")
            for method in [base, *self._variants(f"{where}.vary", base, vary)]:
                self._expect_own_folder(where, method.name, found)
                found[method.name] = method
        return found

    def _named(self, key: str, given: object) -> list[tuple[str, object]]:
        if not isinstance(given, Mapping) or not given:
            raise self.error(key, f"expected names with keys and values below each, got {shorten(given)}")
        for name in given:
            if not isinstance(name, str) or not name.strip() or not name.isprintable():  # a line end would end a table
                raise self.error(key, f"expected a name on one line, got {shorten(name)}")
        return list(given.items())

    def _variants(self, key: str, base: Method, vary: object) -> list[Method]:
        """Make a method for every value of every varied option, one option at a time."""
        if not isinstance(vary, Mapping):
            raise self.error(key, f"expected options with lists of values, got {shorten(vary)}")
        found = []
        for option, values in vary.items():
            where = f"{key}.{option}"
            if not isinstance(values, list) or not values:
                raise self.error(where, f"expected a list of values, got {shorten(values)}")
            group, _, inner = str(option).rpartition(".")
            for value in values:
                changed: dict[str, Any]
                if group == "training":
                    changed = {"training": self.read(f"{key}.training", Training, {inner: value}, base.training)}
                elif option == "learning_rate":
                    changed = {"learning_rate": self._plain(where, float, value)}
                elif group in ("", "options", "peft"):
                    changed = {group or "options": getattr(base, group or "options") | {inner: value}}
                else:
                    raise self.error(where, "expected an option of QPeftConfig, peft.…, training.… or learning_rate")
                text = "+".join(map(str, value)) if isinstance(value, list) else value
                name = f"{base.name}, {inner}={text if text not in ((), '') else 'none'}"
                found.append(replace(base, name=name, varied=Varied(base.name, inner, value), **changed))
        return found


class _Checker:
    """Checks that the parts of a plan fit each other."""

    def __init__(self, reader: _Reader, plan: Plan) -> None:
        self.plan, self.error = plan, reader.error

    def check(self) -> None:
        """Raises: ValueError for the first mistake."""
        plan = self.plan
        try:
            check_measures(plan.measures)
        except ValueError as error:
            raise self.error("measures", error) from None
        try:
            expect_kv_dtype(plan.kv_dtype, "it")
        except ValueError as error:
            raise self.error("kv_dtype", error) from None
        if len(set(plan.seeds)) < len(plan.seeds):
            raise self.error("seeds", f"each can be given once only, got {list(plan.seeds)}")
        for option in SET_BY_THE_PLAN:
            if option in plan.options:
                raise self.error(f"options.{option}", f"is set by {SET_BY_THE_PLAN[option]}")
        for name, method in plan.methods.items():
            self._check_method(f"methods.{method.varied.name if method.varied else name}", method)
        for name in plan.collections:
            self._check_collection(f"collections.{name}", name)

    def _check_collection(self, key: str, name: str) -> None:
        collection = self.plan.collections[name]
        for method in self.plan.methods_of(name).values():
            if method.preset.trained and getattr(collection, method.examples) is None:
                raise self.error(key, f"the key {method.examples!r} is missing; {method.name!r} is trained on it")
            if method.of and collection.dev is None:
                raise self.error(key, f"the key 'dev' is missing; {method.name!r} chooses its weights on it")
        if collection.dev and collection.dev.examples:
            raise self.error(f"{key}.dev", "expected data: a fusion is chosen on rankings, not on examples")

    def _check_method(self, key: str, method: Method) -> None:
        if method.examples not in ("train", "synthetic"):
            raise self.error(f"{key}.examples", f"expected train or synthetic, got {method.examples!r}")
        for option in (*SAME_FOR_ALL, *SET_BY_THE_PLAN):
            if option in method.options:
                belongs = SET_BY_THE_PLAN.get(option, f"options.{option} of the plan, the same for all methods")
                raise self.error(f"{key}.options.{option}", f"is set by {belongs}")
        if method.preset.trained and method.learning_rate is None:
            raise self.error(key, "the key 'learning_rate' is missing; choose it on dev")
        self._check_fusion(key, method)
        if method.peft and method.preset.peft is None:
            raise self.error(f"{key}.peft", f"{method.method} has no peft config")
        if method.passages and method.method in (FIRST_STAGE, "fusion"):
            raise self.error(f"{key}.passages", f"{method.method} reads no documents")
        try:
            config = self.plan.config(method, self.plan.seeds[0])
            check_passages(**method.passage_options, limit=config.max_document_tokens)
            peft_options(method.preset, method.peft)
        except (TypeError, ValueError) as error:
            raise self.error(key, error) from None

    def _check_fusion(self, key: str, method: Method) -> None:
        if (method.method == "fusion") != (method.of is not None):
            raise self.error(
                key,
                "the key 'of', the method to fuse with the first stage, belongs to method: fusion"
                + (" and is missing" if method.of is None else ""),
            )
        taken = self.plan.methods.get(method.of) if method.of else None
        if method.of and (taken is None or taken.method in ("fusion", FIRST_STAGE)):
            raise self.error(
                f"{key}.of",
                f"expected another method of the plan that is no fusion, got {method.of!r}"
                f"{did_you_mean(method.of, self.plan.methods)}",
            )
