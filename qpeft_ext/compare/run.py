"""`Comparison`: makes the results of a plan, one for each collection, method and seed, and finds them again later."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import formats
from ..evaluation.measures import per_query
from ..formats.trec import Run
from ..utils.console import say
from ..utils.files import write_text
from ..utils.locks import claim
from ..utils.words import counted
from .cells import ADAPTER, DEV_RUN, RESULT, RUN, SETTINGS, TRAINED, Cell, cells
from .data import CollectionData, Ranked, digest
from .methods import FIRST_STAGE, UPR
from .plan import Method, Plan, file_name
from .provenance import provenance
from .settings import plan_settings
from .train import trained_model

if TYPE_CHECKING:
    from ..model import QPeftModel
    from ..prefixes.cache import DocumentCache
    from ..prefixes.index import PrefixIndex
    from .prefixes import Prefixes

# settings that an adapter does not depend on
NOT_TRAINED_ON = ("test", "passages", "passage_tokens", "passage_stride")
FORMAT = 1  # of the settings; raised when a method computes something else, so that old results are made again


class Comparison:
    """Makes the results of a plan.

    Args:
        plan: the plan.
        root: folder that paths of the plan are below.
        output: folder for the results.
        device: device of the LM.
    """

    def __init__(self, plan: Plan, root: Path, output: Path, device: str) -> None:
        from ..lm.loading import load_tokenizer
        from ..prompts.prompt import Prompt

        self.plan, self.root, self.output, self.device = plan, root, output, device
        self._prompt = Prompt(load_tokenizer(plan.lm_name), plan.config(Method(UPR), plan.seeds[0]))
        self._data: dict[str, CollectionData] = {}
        self._indexes: dict[str, PrefixIndex] = {}

    def data(self, collection: str) -> CollectionData:
        """Return the data of a collection, which is read once."""
        if collection not in self._data:
            self._data[collection] = CollectionData(self.plan.collections[collection], self.root, self._prompt)
        return self._data[collection]

    def index(self, collection: str) -> PrefixIndex | None:
        """Return the index of a collection, if the plan names one. Raises: ValueError if it is of another prompt."""
        from ..prefixes.index import PrefixIndex

        folder = self.plan.collections[collection].index
        if folder and collection not in self._indexes:
            self._indexes[collection] = PrefixIndex(self.root / folder)
            self._indexes[collection].expect_prompt(self._prompt)
        return self._indexes.get(collection)

    @cached_property
    def lm_digest(self) -> str:
        """Fingerprint of the LM's files."""
        from ..lm.loading import lm_digest

        return lm_digest(self.plan.lm_name)

    def run(self) -> None:
        """Make every result that is not there yet, and wait for those that other processes have begun.

        Raises: ValueError at the end, if a method failed.
        """
        for collection in self.plan.collections:  # a mistake in the data is known before hours of training
            self.data(collection)
            self.index(collection)
        failed: list[str] = []
        elsewhere = self._make_all(cells(self.plan, self.output), failed, wait=False)
        if elsewhere:
            results = counted(len(elsewhere), "results")
            say(f"another process is making {results}, the first: {elsewhere[0].name}; waiting")
        self._make_all(elsewhere, failed, wait=True)
        if failed:
            raise ValueError(f"{counted(len(failed), 'results')} could not be made; the first: {failed[0]}")

    def _make_all(self, asked: Iterable[Cell], failed: list[str], wait: bool) -> list[Cell]:
        """Make results that are not there.

        Args:
            asked: the results.
            failed: gets a message for each that could not be made.
            wait: wait for other processes.

        Returns: without ``wait`` the results that other processes are making, and the fusions that take them.
        """
        elsewhere: list[Cell] = []
        for cell in asked:
            if cell.method.of and self._taken(cell) in elsewhere:
                elsewhere.append(cell)
                continue
            with claim(cell.folder, wait) as mine:
                if not mine:
                    elsewhere.append(cell)
                    continue
                try:
                    self.ensure(cell)
                except (ValueError, TypeError, ImportError) as error:  # one method fails; the others are still compared
                    failed.append(f"{cell.name}: {' '.join(str(error).split())}")
                    say(f"failed: {failed[-1]}")
        return elsewhere

    def ensure(self, cell: Cell) -> None:
        """Make a result, unless it is there with the same settings."""
        settings, there = self.settings(cell), cell.read()
        if there and there["settings"] == settings:
            if set(self.plan.measures) - set(there["per_query"]):
                run = formats.read_run(cell.folder / RUN)
                self._write(cell, there | {"per_query": self._per_query(cell, run)})
            say(f"{cell.name}: there already")
            return
        self._prepare(cell, settings)
        started = time.perf_counter()
        run, facts = self._make(cell, settings)
        result = {
            "collection": cell.collection, "method": cell.method.name, "seed": cell.seed, "settings": settings,
            **facts, "per_query": self._per_query(cell, run), "seconds": time.perf_counter() - started,
            **provenance(),
        }  # fmt: skip
        self._write(cell, result)
        say(f"{cell.name}: {_summary(result, self.plan.measures[0])}")

    def _prepare(self, cell: Cell, settings: dict) -> None:
        """Make the folder of a result, and remove what was made in it with other settings."""
        earlier = cell.read(SETTINGS) or {}
        if changed := differences(earlier, settings):
            if earlier:
                say(f"{cell.name}: made anew, since {', '.join(changed)} changed")
            keep = {ADAPTER, TRAINED} if not differences(earlier, settings, but=NOT_TRAINED_ON) else set()
            for path in cell.folder.glob("*"):
                if path.name not in keep:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_text(cell.folder / SETTINGS, json.dumps(settings, indent=1) + "\n", follow=False)

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return everything that a result depends on, as plain values.

        Versions and commit are written into the result but are no settings: with others it is not made again.
        """
        method, test = cell.method, self.data(cell.collection).test
        settings: dict[str, Any] = {"format": FORMAT, "test": test.digest}
        settings |= plan_settings(self.plan, method, cell.seed)
        if method.method == FIRST_STAGE:
            return settings
        settings["lm"] = self.lm_digest
        index = self.index(cell.collection)
        if kv_dtype := self.plan.kv_dtype or (index.kv_dtype if index else None):
            settings["kv_dtype"] = kv_dtype
        if method.of:
            dev = self.data(cell.collection).dev
            return settings | {"of": self.settings(self._taken(cell)), "dev": dev.digest}
        if method.preset.trained:
            examples = self.data(cell.collection).examples(method.examples, method.training, cell.seed)
            settings["training"]["examples"] = digest(examples)
        return settings

    def _taken(self, cell: Cell) -> Cell:
        """Return the result that a fusion takes."""
        method, seed = self.plan.taken(cell.method, cell.seed)
        return Cell(self.output, cell.collection, method, seed)

    def _make(self, cell: Cell, settings: dict) -> tuple[Run, dict[str, Any]]:
        """Make and write the run of a result. Returns: the run, and facts about making it."""
        test, method = self.data(cell.collection).test, cell.method
        if method.method == FIRST_STAGE:
            formats.write_run(cell.folder / RUN, test.candidates, tag=file_name(test.first_stage))
            return test.candidates, {"first_stage": test.first_stage}
        if method.of:
            return self._fuse(cell, self._taken(cell), test)
        model, facts = self._trained(cell)
        run, more = self._rank(cell, model, test, cell.folder / RUN, settings)
        return run, facts | more

    def _trained(self, cell: Cell) -> tuple[QPeftModel, dict[str, Any]]:
        """Return the trained model of a result, and facts about it."""
        if cell.method.preset.trained and cell.read(TRAINED) is None:
            self._take_adapter(cell)
        return trained_model(
            self.plan, cell, self.data(cell.collection), self.device, lambda model: self._prefixes(cell, model)
        )

    def _take_adapter(self, cell: Cell) -> None:
        """Copy the adapter that was trained with the same settings for another collection, if there is one."""
        settings = self.settings(cell)
        for collection in self.plan.all_collections:
            other = replace(cell, collection=collection)
            trained = other.read(TRAINED)
            if trained is None or not (other.folder / ADAPTER).is_dir():
                continue
            if not differences(other.read(SETTINGS) or {}, settings, but=NOT_TRAINED_ON):
                shutil.rmtree(cell.folder / ADAPTER, ignore_errors=True)
                shutil.copytree(other.folder / ADAPTER, cell.folder / ADAPTER)
                facts = {"trained_for": collection} | trained
                # written last, since it says that the adapter is complete
                write_text(cell.folder / TRAINED, json.dumps(facts, indent=1) + "\n", follow=False)
                say(f"{cell.name}: trained for {collection} already")
                return

    def _prefixes(self, cell: Cell, model: QPeftModel, ranking: bool = False) -> Prefixes:
        """Return the cache that the model of a result is trained with, or ranks with.

        Args:
            ranking: whether it ranks; by passages it does so without the index, which has whole documents.
        """
        from .prefixes import Prefixes, shares_prefixes

        index, shared = self.index(cell.collection), self._cache_on_disk
        if not shares_prefixes(cell.method, model, self._prompt):
            index = shared = None
        if ranking and cell.method.passages is not None:
            index = None
        return Prefixes(self.plan, index, shared)

    @cached_property
    def _cache_on_disk(self) -> DocumentCache | None:
        from .prefixes import cache_on_disk

        return cache_on_disk(self.plan, self.output)

    def _rank(
        self, cell: Cell, model: QPeftModel, ranked: Ranked, path: Path, settings: dict
    ) -> tuple[Run, dict[str, Any]]:
        """Rerank the candidates, from where an earlier process stopped.

        Returns: the run, and facts about its making; costs are of what this process ranked.
        """
        from ..ranking.reranker import Reranker
        from ..ranking.run import by_likelihood, by_similarity, rerank_run, run_blocks
        from .cost import PETA, PeakMemory, Work

        method, prefixes = cell.method, self._prefixes(cell, model, ranking=True)
        reranker = Reranker(model, cache=prefixes.cache, **method.passage_options)
        rank = (by_likelihood if method.preset.lm else by_similarity)(reranker)
        partial = formats.PartialRun(
            path, ranked.candidates, settings, tag=file_name(method.name), blocks=run_blocks(ranked.candidates)
        )
        try:
            with Work(model.engine) as work, PeakMemory(model.device) as peak:
                result = rerank_run(
                    rank, ranked.queries, ranked.corpus, ranked.candidates, name=method.name, partial=partial
                )
            there = partial.num_resumed
            fresh = list(ranked.candidates)[there:]
            partial.finish()
        finally:
            partial.close()
        facts: dict[str, Any] = {"ranking": {
            "pairs": result.num_pairs, "seconds": result.seconds, "resumed_queries": there,
            "documents_per_second": result.num_pairs / result.seconds if fresh else None,
            "peak_bytes": peak.bytes, "truncated": reranker.truncated, "prefixes_from_index": prefixes.from_index,
        }}  # fmt: skip
        if method.preset.lm and fresh:
            head_rows = sum(model.head_rows(ranked.queries[q]) * len(ranked.candidates[q]) for q in fresh)
            flops = work.flops(head_rows)
            facts["ranking"] |= {
                "lm_tokens": work.tokens,
                "flops": flops,
                "queries_per_petaflop": len(fresh) / flops * PETA,
            }
        return formats.read_run(path), facts

    def _fuse(self, cell: Cell, source: Cell, test: Ranked) -> tuple[Run, dict[str, Any]]:
        """Fuse the run of ``source`` with the first stage, with the weights that are best on the dev queries."""
        from ..evaluation.fusion import choose_weights, fuse

        dev = self.data(cell.collection).dev
        if source.read() is None:
            raise ValueError(f"there is no result of {source.method.name!r}, which it takes")
        if not (source.folder / RUN).exists():
            raise ValueError(
                f"of {source.method.name!r}, which it takes, there are values but no run; remove "
                f"{source.folder / RESULT} to have it made again"
            )
        model, _ = self._trained(source)
        dev_run, _ = self._rank(source, model, dev, cell.folder / DEV_RUN, self.settings(cell))
        reranked = formats.read_run(source.folder / RUN)
        weights, value = choose_weights([dev_run, dev.candidates], dev.qrels)
        run = fuse([reranked, test.candidates], weights)
        formats.write_run(cell.folder / RUN, run, tag=file_name(cell.method.name))
        return run, {"fusion": {"weights": weights, "dev_nDCG@10": value, "dev_queries": len(dev.queries)}}

    def _per_query(self, cell: Cell, run: Run) -> dict[str, dict[str, float]]:
        return per_query(run, self.data(cell.collection).test.qrels, self.plan.measures)

    def _write(self, cell: Cell, result: dict) -> None:
        write_text(cell.folder / RESULT, json.dumps(result, indent=1) + "\n", follow=False)


def _summary(result: dict[str, Any], measure: str) -> str:
    """Return what is said of a result when it has been made."""
    values = result["per_query"][measure].values()
    text = f"{measure} {statistics.fmean(values) if values else 0:.4f}"
    if "training" in result:
        taken = result["training"].get("trained_for")
        text += f", trained for {taken}" if taken else f", trained in {result['training']['seconds']:.0f} s"
    if "ranking" in result:
        text += f", ranked {counted(result['ranking']['pairs'], 'pairs')} in {result['ranking']['seconds']:.0f} s"
    return text


def differences(then: dict, now: dict, but: Collection[str] = (), prefix: str = "") -> list[str]:
    """Return the names of the settings that differ, except for those in ``but``."""
    found = []
    for name in {**then, **now}:
        if name in but or (name in then and name in now and then[name] == now[name]):
            continue
        if isinstance(then.get(name), dict) and isinstance(now.get(name), dict):
            found += differences(then[name], now[name], prefix=f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
