"""`Source`, the split of a collection that is converted, and `Conversion`, the counts of what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..utils.words import counted
from .collection import Collection
from .trec import Qrels, Run

_ONE = {  # singular of what counts are of, where it is not that of the first word alone
    "queries' answers": "query's answers",
    "documents that are no candidates": "document that is no candidate",
    "judgements of documents that are no candidates": "judgement of a document that is no candidate",
    "scores of candidates (their order is kept)": "score of a candidate (its order is kept)",
    "candidates of queries without text": "candidate of a query without text",
    "texts of documents": "text of a document",
    "texts of queries": "text of a query",
}


@dataclass
class Conversion:
    """Counts of what was written, and of what the target cannot store or was left out, by words."""

    written: Counter = field(default_factory=Counter)
    lost: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        def listed(counts: Counter) -> str:
            parts = (counted(count, what, _ONE.get(what)) for what, count in counts.items() if count)
            return ", ".join(parts) or "nothing"

        return f"wrote {listed(self.written)}; not held: {listed(self.lost)}"


@dataclass
class Source:
    """One split of a collection, whose missing parts are None.

    Args:
        data: the collection.
        split: name of the split; None for the default one.
        run: replaces the candidates of the collection.
    """

    data: Collection
    split: str | None = None
    run: Run | None = None

    def __post_init__(self) -> None:
        if self.split is not None:
            self.data.choose_split(self.split)
        self.split = self.split or self.data.default_split()
        if self.run is None and self._has("candidates"):
            self.run = self.data.candidates(self.split)

    def _has(self, part: str) -> bool:
        return self.data.has(part, self.split)

    @property
    def name(self) -> str:
        """The name of the split in file names."""
        return self.split or "test"

    @property
    def corpus(self) -> Mapping[str, dict] | None:
        return self.data.corpus if "corpus" in self.data.parts else None

    @property
    def queries(self) -> dict[str, str] | None:
        return self.data.queries(self.split) if "queries" in self.data.parts else None

    @property
    def answers(self) -> dict[str, list[str]] | None:
        return self.data.answers(self.split) if self._has("answers") else None

    @property
    def qrels(self) -> Qrels | None:
        return self.data.qrels(self.split) if self._has("qrels") else None

    def asked(self, done: Conversion) -> dict[str, str]:
        """Return the queries that are judged or have candidates: some formats keep those of all splits in one file."""
        queries, qrels = self.queries or {}, self.qrels
        if qrels is None and self.run is None:
            return queries
        asked = {q: text for q, text in queries.items() if q in (qrels or {}) or q in (self.run or {})}
        done.lost["queries of other splits"] = len(queries) - len(asked)
        return asked

    def need(self, target: str, *parts: str) -> list[Any]:
        """Return the parts that ``target`` is made of. Raises: ValueError if one of them is missing."""
        values = []
        for part in parts:
            value = self.run if part == "candidates" else getattr(self, part)
            if value is None:
                hint = "; give a run" if part == "candidates" else ""
                raise ValueError(
                    f"{target} is made of {', '.join(parts)}, but {self.data.place} ({self.data.format}) "
                    f"holds {', '.join(self.data.parts) or 'nothing'}{hint}"
                )
            values.append(value)
        return values
