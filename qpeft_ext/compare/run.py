"""The loop over collections, methods and seeds: one folder for each result, made once, found again by the next run."""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import formats
from ..evaluation.measures import per_query
from ..formats.trec import Run
from ..utils.console import say
from ..utils.files import write_text
from ..utils.locks import claim
from .cells import ADAPTER, DEV_RUN, RESULT, RUN, SETTINGS, TRAINED, Cell, cells
from .data import CollectionData, Ranked, digest
from .methods import FIRST_STAGE, UPR, peft_options
from .plan import Method, Plan, file_name
from .train import trained_model

if TYPE_CHECKING:
    from ..prefixes.index import PrefixIndex
    from .prefixes import Prefixes

NOT_TRAINED_ON = ("test",)  # the setting that an adapter does not depend on
FORMAT = 1  # of the settings: a change of what a method computes makes old results void


class Comparison:
    """Makes the results of a plan.

    Args:
        root: folder that paths of the plan are below.  output: folder for the results.  device: of the LM.
    """

    def __init__(self, plan: Plan, root: Path, output: Path, device: str) -> None:
        from ..lm.loading import load_tokenizer
        from ..prompts.prompt import Prompt

        self.plan, self.root, self.output, self.device = plan, root, output, device
        self._prompt = Prompt(load_tokenizer(plan.lm_name), plan.config(Method(UPR), plan.seeds[0]))
        self._data: dict[str, CollectionData] = {}
        self._indexes: dict[str, PrefixIndex] = {}

    def data(self, collection: str) -> CollectionData:
        if collection not in self._data:
            self._data[collection] = CollectionData(self.plan.collections[collection], self.root, self._prompt)
        return self._data[collection]

    def index(self, collection: str) -> PrefixIndex | None:
        from ..prefixes.index import PrefixIndex

        folder = self.plan.collections[collection].index
        if folder and collection not in self._indexes:
            self._indexes[collection] = PrefixIndex(self.root / folder)
            self._indexes[collection].expect_prompt(self._prompt)
        return self._indexes.get(collection)

    @cached_property
    def lm_digest(self) -> str:
        from ..lm.loading import lm_digest

        return lm_digest(self.plan.lm_name)

    def run(self) -> None:
        """Make every result that is not there yet, other processes those that they have begun.

        Raises: ValueError at the end, if a method failed.
        """
        for collection in self.plan.collections:  # a mistake in the data is known before hours of training
            self.data(collection)
            self.index(collection)
        failed: list[str] = []
        elsewhere = self._make_all(cells(self.plan, self.output), failed, wait=False)
        if elsewhere:
            say(f"another process is making {len(elsewhere)} results, the first: {elsewhere[0].name}; waiting for them")
        self._make_all(elsewhere, failed, wait=True)
        if failed:
            raise ValueError(f"{len(failed)} results could not be made; the first: {failed[0]}")

    def _make_all(self, asked: Iterable[Cell], failed: list[str], wait: bool) -> list[Cell]:
        """Those that another process is at, and what takes them, come back unless they are waited for."""
        elsewhere: list[Cell] = []
        for cell in asked:
            if cell.method.of and self._fused(cell) in elsewhere:
                elsewhere.append(cell)
                continue
            with claim(cell.folder, wait) as mine:
                if not mine:
                    elsewhere.append(cell)
                    continue
                try:
                    self.ensure(cell)
                except (ValueError, TypeError, ImportError) as error:  # of one method; the others go on
                    failed.append(f"{cell.name}: {' '.join(str(error).split())}")
                    say(f"failed: {failed[-1]}")
        return elsewhere

    def ensure(self, cell: Cell) -> None:
        """Make a result, unless it is there with the same settings; one with other settings is made anew."""
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
        self._write(cell, {
            "collection": cell.collection, "method": cell.method.name, "seed": cell.seed, "settings": settings,
            **facts, "per_query": self._per_query(cell, run), "seconds": time.perf_counter() - started,
            **provenance(),
        })  # fmt: skip
        say(f"{cell.name}: {self._summary(cell)}")

    def _prepare(self, cell: Cell, settings: dict) -> None:
        """A folder that holds nothing but what an earlier run made with the same settings."""
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
        """What a result depends on, in plain values. Versions and commit are kept beside it and do not void it."""
        method, test = cell.method, self.data(cell.collection).test
        settings: dict[str, Any] = {"format": FORMAT, "method": method.method, "test": test.digest}
        if method.method == FIRST_STAGE:
            return settings
        settings |= {"lm": self.lm_digest, "dtype": self.plan.dtype}
        if method.of:
            dev = self.data(cell.collection).dev
            return settings | {"of": self.settings(self._fused(cell)), "dev": dev.digest}
        settings["config"] = json.loads(json.dumps(self.plan.config(method, cell.seed).to_dict()))
        if method.preset.trained:
            examples = self.data(cell.collection).examples(method.examples, method.training, cell.seed)
            peft = peft_options(method.preset, method.peft) if method.preset.peft else None
            settings["training"] = asdict(method.training) | {
                "learning_rate": method.learning_rate,
                "examples": digest(examples),
                "peft": peft,
            }
        return settings

    def _fused(self, cell: Cell) -> Cell:
        """The cell that a fusion takes; what is not trained has one seed only."""
        method = self.plan.methods[cell.method.of]
        seeds = self.plan.seeds_of(method)
        return Cell(self.output, cell.collection, method, cell.seed if cell.seed in seeds else seeds[0])

    def _make(self, cell: Cell, settings: dict) -> tuple[Run, dict[str, Any]]:
        """The run of a cell, written, and the facts about making it."""
        test, method = self.data(cell.collection).test, cell.method
        if method.method == FIRST_STAGE:
            formats.write_run(cell.folder / RUN, test.candidates, tag=file_name(test.first_stage))
            return test.candidates, {"first_stage": test.first_stage}
        if method.of:
            return self._fuse(cell, test)
        model, facts = self._trained(cell)
        run, more = self._rank(cell, model, test, cell.folder / RUN, settings)
        return run, facts | more

    def _trained(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
        if cell.method.preset.trained and cell.read(TRAINED) is None:
            self._take_adapter(cell)
        return trained_model(
            self.plan, cell, self.data(cell.collection), self.device, lambda model: self._prefixes(cell, model)
        )

    def _take_adapter(self, cell: Cell) -> None:
        """A copy of the adapter that was trained for another collection with the same settings, if there is one."""
        settings = self.settings(cell)
        for collection in self.plan.all_collections:
            other = replace(cell, collection=collection)
            trained = other.read(TRAINED)
            whole = trained and (other.folder / ADAPTER).is_dir()
            if whole and not differences(other.read(SETTINGS) or {}, settings, but=NOT_TRAINED_ON):
                shutil.rmtree(cell.folder / ADAPTER, ignore_errors=True)
                shutil.copytree(other.folder / ADAPTER, cell.folder / ADAPTER)
                facts = {"trained_for": collection} | trained
                # last: the adapter is whole
                write_text(cell.folder / TRAINED, json.dumps(facts, indent=1) + "\n", follow=False)
                say(f"{cell.name}: trained for {collection} already")
                return

    def _prefixes(self, cell: Cell, model) -> Prefixes:
        from .prefixes import Prefixes, reads_index

        index = self.index(cell.collection)
        mine = index is not None and reads_index(cell.method, model, self._prompt)
        return Prefixes(self.plan.cache_bytes, index if mine else None)

    def _rank(self, cell: Cell, model, ranked: Ranked, path: Path, settings: dict) -> tuple[Run, dict[str, Any]]:
        """Rerank the candidates, going on from where a kill stopped it; costs are of what this process ranked."""
        from ..ranking.reranker import Reranker
        from ..ranking.run import by_likelihood, by_similarity, rerank_run, run_blocks
        from .cost import PETA, PeakMemory, Work

        method, prefixes = cell.method, self._prefixes(cell, model)
        reranker = Reranker(model, cache=prefixes.cache)
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
            of_pair = {q: len(model.prompt.queries([ranked.queries[q]])[0]) for q in fresh}
            answers = getattr(model, "answers", None)
            head_rows = sum((len(answers) if answers else of_pair[q]) * len(ranked.candidates[q]) for q in fresh)
            flops = work.flops(head_rows)
            facts["ranking"] |= {
                "lm_tokens": work.tokens,
                "flops": flops,
                "queries_per_petaflop": len(fresh) / flops * PETA,
            }
        return formats.read_run(path), facts

    def _fuse(self, cell: Cell, test: Ranked) -> tuple[Run, dict[str, Any]]:
        """Scores of a method and the first stage, weights chosen on dev queries."""
        from ..evaluation.fusion import choose_weights, fuse

        source, dev = self._fused(cell), self.data(cell.collection).dev
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

    def _summary(self, cell: Cell) -> str:
        from statistics import fmean

        result, measure = cell.read(), self.plan.measures[0]
        values = result["per_query"][measure].values()
        text = f"{measure} {fmean(values) if values else 0:.4f}"
        if "training" in result:
            taken = result["training"].get("trained_for")
            text += f", trained for {taken}" if taken else f", trained in {result['training']['seconds']:.0f} s"
        if "ranking" in result:
            text += f", ranked {result['ranking']['pairs']} pairs in {result['ranking']['seconds']:.0f} s"
        return text


def differences(then: dict, now: dict, but: Collection[str] = (), prefix: str = "") -> list[str]:
    """Names of the settings that differ, other than ``but``."""
    found = []
    for name in {**then, **now}:
        if name in but or (name in then and name in now and then[name] == now[name]):
            continue
        if isinstance(then.get(name), dict) and isinstance(now.get(name), dict):
            found += differences(then[name], now[name], prefix=f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


@cache
def provenance() -> dict[str, Any]:
    """Versions, commit, machine and date: what a result was made with."""
    from ..utils.environment import machine, versions

    return {
        "versions": versions(),
        "commit": _commit(),
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str | None:
    """Of the source tree that the package runs from; None for an installed one."""
    place = Path(__file__).resolve().parents[2]
    if not (place / ".git").exists():
        return None
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=place, capture_output=True, text=True, timeout=10)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=place, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() + (" with changes" if changed.stdout.strip() else "") or None
