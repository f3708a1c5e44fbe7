"""``qpeft demo``: train adapters on a frozen LM, rerank unseen queries, and say what changed.

With the packaged LM on the installed packages only Q-PEFT-R is trained; Q-PEFT-R with a generated LoRA, the method that
ranked best in benchmarks/quality, comes along. With another LM or another collection both are trained.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from ..config import QPeftConfig
from ..evaluation.comparison import compare_table
from ..evaluation.fusion import fuse
from ..evaluation.measures import evaluate
from ..evaluation.report import Report, render, write_html
from ..evaluation.significance import format_p
from ..formats import training_examples, write_run
from ..formats.trec import Run
from ..lm.loading import BASE_LM
from ..prompts.prompt import Prompt
from ..ranking.first_stage import bm25_run
from ..ranking.run import by_likelihood, by_similarity, rerank_run
from ..utils.console import say
from ..utils.files import write_text
from .data import DemoData, load_demo_data
from .examples import report_examples

ADAPTER = Path(__file__).parent / "adapter"  # of it; benchmarks/quality/package_adapter.py
QUERIES = 1000
MEASURE = "nDCG@10"  # decides on dev, and is plotted
MAX_QUERY_TOKENS = 64  # longer first sentences are left out, whatever the tokenizer
FIRST, SIMILARITY, UPR, CLUES, BEST = "BM25", "similarity only", "UPR", "Q-PEFT-R", "Q-PEFT-R + generated LoRA"


@dataclass(frozen=True)
class Settings:
    """What the demo does, sized for two cores and ten minutes."""

    candidates: int = 20
    num_negatives: int = 7  # of BM25's top 40: with the positive, lists of 8
    queries_per_step: int = 8
    train_queries: int = 1200
    train_queries_clues: int = 320  # of them
    learning_rate_clues: float = 1e-4
    learning_rate_best: float = 1e-3  # as in benchmarks/quality/choose.yaml
    evaluations: int = 3
    dev_examples: int = 100
    cache_bytes: int = 6 << 30
    fusion_weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the reranker; BM25 the rest

    def config(self, system: str) -> QPeftConfig:
        own = {
            UPR: {"clues": "none"},
            CLUES: {"clues": "top_k", "filters": ("non_alphabetic", "stop_words")},
            BEST: {"clues": "top_k", "generated_lora_rank": 16, "target_modules": ("all-linear",)},
        }
        return QPeftConfig(
            loss="listwise",
            num_hard_negatives=self.num_negatives,
            in_batch_negatives=False,
            queries_per_group=self.queries_per_step,
            max_document_tokens=160,  # as the packaged LM was trained
            max_query_tokens=MAX_QUERY_TOKENS,
            **own[system],
        )

    def training_of(self, system: str) -> tuple[int, float]:
        """How many training queries, and the learning rate."""
        if system == CLUES:
            return min(self.train_queries, self.train_queries_clues), self.learning_rate_clues
        return self.train_queries, self.learning_rate_best


def main(
    model: str | None = None,
    data: str | Path | None = None,
    output: str | Path = "demo",
    queries: int = QUERIES,
    seed: int = 0,
    settings: Settings | None = None,
) -> Report:
    """Run the demo and write ``report.html``, the run files and the adapters to ``output``.

    Args:
        model: base LM (Hub id or folder); None: the small one that is packaged.
        data: BEIR folder; None: functions and docstrings harvested from the installed packages.
        queries: test queries, sampled by ``seed``.
    """
    from ..lm.loading import is_encoder_decoder, load_lm, load_tokenizer, quiet_transformers
    from ..model import get_qpeft_model
    from ..prefixes.cache import DocumentCache
    from ..ranking.reranker import Reranker

    started, settings, output = time.perf_counter(), settings or Settings(), Path(output)
    quiet_transformers()
    logging.getLogger("qpeft_ext").setLevel(logging.WARNING)
    packaged = model is None and data is None  # the LM and the collection that the packaged adapter is for
    name = model or BASE_LM
    lm, tokenizer = load_lm(name, dtype="float32" if model is None else None), load_tokenizer(name)
    prompt = Prompt(tokenizer, settings.config(UPR), is_encoder_decoder(lm.config))
    collections = load_demo_data(data, queries, settings.train_queries, seed, prompt.fits)
    output.mkdir(parents=True, exist_ok=True)
    say(collections.describe())

    train, dev, test = collections.train, collections.dev, collections.test
    first = {
        part: bm25_run(c.documents, c.queries, k)
        for part, c, k in (
            ("train", train, 40),
            ("dev", dev, settings.candidates),
            ("test", test, settings.candidates),
        )
    }
    examples = training_examples(
        train.queries, train.qrels, first["train"], train.documents, num_negatives=settings.num_negatives, seed=seed
    )[0]
    dev_examples = training_examples(
        dev.queries, dev.qrels, first["dev"], dev.documents, num_negatives=settings.num_negatives, seed=seed
    )[0][: settings.dev_examples]

    cache = DocumentCache(settings.cache_bytes)  # one LM, one template: all systems share the prefixes
    rerankers, notes = {}, []
    for system in (UPR, CLUES, BEST):
        if system == BEST and packaged:
            qpeft_model, note = _packaged(lm, tokenizer)
            notes.append(note)
        else:
            qpeft_model = get_qpeft_model(lm, settings.config(system), tokenizer)
            if system != UPR:
                notes.append(_train(system, qpeft_model, examples, dev_examples, output, settings, seed))
                qpeft_model.save_pretrained(output / f"adapter-{_without_spaces(system)}")
        rerankers[system] = Reranker(qpeft_model, cache=cache)
    say("\n".join(notes))

    runs: dict[str, dict[str, Run]] = {"dev": {FIRST: first["dev"]}, "test": {FIRST: first["test"]}}
    seconds: dict[str, float] = {}
    cache.clear()
    for part, collection in (("dev", dev), ("test", test)):
        rankers = {system: by_likelihood(reranker) for system, reranker in rerankers.items()}
        if part == "test":
            rankers = {SIMILARITY: by_similarity(rerankers[CLUES])} | rankers
        for system, rank in rankers.items():
            cache.clear()  # every system pays for its own prefixes: the times are cold ones
            result = rerank_run(rank, collection.queries, collection.documents, first[part], name=f"{system} ({part})")
            runs[part][system] = result.run
            seconds[system] = result.seconds / max(1, len(result.run))
    best, weight = _best_fusion(runs["dev"], dev.qrels, settings.fusion_weights)
    fused = f"{best} + BM25"
    runs["test"][fused] = fuse([runs["test"][best], first["test"]], [weight, 1 - weight])
    notes.append(
        f"{fused}: min-max scores, weight {weight} on {best}, chosen with the system on "
        f"{len(dev.queries)} dev queries of other packages"
        if data is None
        else f"{fused}: weight {weight} on {best}, chosen on {len(dev.queries)} dev queries"
    )

    table = compare_table(runs["test"], test.qrels)
    notes += _against_upr(runs["test"], test.qrels)
    per_query = {
        system: evaluate(run, test.qrels, [MEASURE]).per_query[MEASURE] for system, run in runs["test"].items()
    }
    report = Report(
        title="Search in your own Python environment" if data is None else f"Reranking {collections.name}",
        lead=f"{len(test.queries)} queries over {len(test.documents):,} documents; the {settings.candidates} best of "
        "BM25 reranked by the log-likelihood that a frozen language model gives the query.",
        setting=_setting(collections, rerankers, settings, seed, name if model else "packaged base LM", packaged),
        table=table,
        measure=MEASURE,
        per_query=per_query,
        seconds_per_query=seconds,
        examples=report_examples(rerankers[BEST], BEST, test, runs["test"][FIRST], runs["test"][BEST]),
        notes=notes,
    )
    for system, run in runs["test"].items():
        write_run(output / f"{_without_spaces(system)}.trec", run, tag=_without_spaces(system))
    report.setting["time of the whole demo"] = f"{(time.perf_counter() - started) / 60:.1f} minutes"
    write_html(report, output / "report.html")
    facts = {"setting": report.setting, "notes": report.notes, "seconds_per_query": seconds, **table.to_dict()}
    write_text(output / "results.json", json.dumps(facts, indent=1) + "\n", follow=False)
    say(render(report))
    say(f"wrote {output / 'report.html'}, the runs and the adapters to {output}/")
    return report


def _without_spaces(system: str) -> str:
    return system.replace(" ", "")


def _packaged(lm, tokenizer):
    """The adapter that comes along, and a line about it."""
    from ..model import QPeftModel

    adapted = QPeftModel.from_pretrained(ADAPTER, lm, tokenizer).eval()
    added = sum(p.numel() for p in adapted.parameters()) - sum(p.numel() for p in lm.parameters())
    return adapted, (
        f"{BEST}: comes with the package ({added:,} parameters), trained on 2,560 queries of 24 packages "
        "that neither the LM nor the test has; the dev queries are of four of them"
    )


def _train(system: str, model, examples: list, dev_examples: list, output: Path, settings: Settings, seed: int) -> str:
    """Train one adapter in place; returns a line on how it went."""
    from ..training.fit import fit

    count, learning_rate = settings.training_of(system)
    examples = examples[:count]
    steps = max(1, len(examples) // settings.queries_per_step)
    every = max(1, steps // settings.evaluations)
    done = fit(
        model,
        examples,
        output / "training" / system,
        learning_rate=learning_rate,
        batch_size=settings.queries_per_step,
        max_steps=steps,
        warm_up=steps // 10,
        dev=dev_examples,
        evaluate_first=True,
        save_every=every,
        log_every=every,
        seed=seed,
        bar=(system, "eval_mrr"),
        per_device_eval_batch_size=settings.queries_per_step,
        save_total_limit=1,
        metric_for_best_model="mrr",
        greater_is_better=True,
    )
    after = done.trainer.evaluate()
    trainable, total = model.get_nb_trainable_parameters()
    model.eval()
    return (
        f"{system}: {steps} steps of {settings.queries_per_step} queries in {done.seconds:.0f} s; reciprocal rank "
        f"among {settings.num_negatives + 1} documents on dev {done.before['eval_mrr']:.3f} → {after['eval_mrr']:.3f}; "
        f"{trainable:,} trainable parameters ({trainable / total:.1%})"
    )


def _against_upr(runs: dict[str, Run], qrels) -> list[str]:
    """The comparison that clues are for: the same LM without them."""
    table = compare_table({system: runs[system] for system in (UPR, CLUES, BEST)}, qrels, [MEASURE], baseline=UPR)
    return [
        f"{system.name} against UPR: {MEASURE} {system.difference[MEASURE]:+.4f}, {format_p(system.p_holm[MEASURE])}"
        for system in table.systems
        if system.difference
    ]


def _best_fusion(runs: dict[str, Run], qrels, weights: tuple[float, ...]) -> tuple[str, float]:
    """The reranker and its weight beside BM25 that do best on dev."""
    choices = [(system, weight) for system in (UPR, CLUES, BEST) for weight in weights]

    def value(choice: tuple[str, float]) -> float:
        system, weight = choice
        return evaluate(fuse([runs[system], runs[FIRST]], [weight, 1 - weight]), qrels, [MEASURE]).means[MEASURE]

    return max(choices, key=value)


def _setting(collections: DemoData, rerankers, settings: Settings, seed: int, name, packaged: bool) -> dict[str, str]:
    import torch

    from ..utils.environment import versions

    trained = {system: settings.training_of(system) for system in (CLUES, BEST)}
    if packaged:
        del trained[BEST]
    total = rerankers[UPR].model.get_nb_trainable_parameters()[1]
    return {
        "language model": f"{name}, {total / 1e6:.1f} M parameters, frozen",
        "collection": collections.name,
        "training": f"listwise over {settings.num_negatives + 1} documents; "
        + "; ".join(
            f"{system}: {min(count, len(collections.train.queries))} queries, learning rate {rate}"
            for system, (count, rate) in trained.items()
        ),
        "dev": f"{len(collections.dev.queries)} queries",
        "seed": str(seed),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join(f"{k} {v}" for k, v in versions().items()),
        "packages": ", ".join(f"{k} {v}" for k, v in collections.versions.items()) or "–",
    }
