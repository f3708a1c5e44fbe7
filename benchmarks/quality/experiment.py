"""One experiment on the ranking: train an adapter, rank the dev queries, compare with UPR query by query.

    python benchmarks/quality/experiment.py --name attention --option clues=attention --lr 1e-3 --steps 150
    python benchmarks/quality/experiment.py --name attention --split test      # scores the adapter of that name

A line for each experiment is added to build/quality/results.jsonl; NOTES.md beside this file tells what came out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from collection import Split, load_split, ndcg
from scipy import stats
from transformers import TrainerCallback, TrainingArguments

from qpeft_ext import DocumentCache, QPeftConfig, QPeftModel, QPeftTrainer, Reranker, get_qpeft_model
from qpeft_ext.config import parse_options
from qpeft_ext.demo.run import BASE_LM, MAX_QUERY_TOKENS
from qpeft_ext.loading import load_lm, load_tokenizer
from qpeft_ext.prompt import Prompt

FOLDER = Path(__file__).parents[2] / "build" / "quality"
FIXED = {"loss": "listwise", "in_batch_negatives": False, "max_document_tokens": 160,
         "max_query_tokens": MAX_QUERY_TOKENS}  # fmt: skip


def mean_likelihoods(model, split: Split, cache: DocumentCache) -> list[np.ndarray]:
    """ℓ of every candidate of the queries whose document was found, a row [M] for each."""
    ids = split.found()
    pairs = [(split.queries[q], split.documents[d]) for q in ids for d, _ in split.run[q]]
    scores = Reranker(model, max_tokens_per_batch=8192, cache=cache).predict(pairs, show_progress_bar=False)
    lengths = {q: len(model.prompt.queries([split.queries[q]])[0]) for q in ids}
    rows = np.split(scores, np.cumsum([len(split.run[q]) for q in ids])[:-1])
    return [row / lengths[q] for q, row in zip(ids, rows, strict=True)]


def places(split: Split) -> list[int]:
    """Where among its candidates each found query has its document."""
    return [next(i for i, (d, _) in enumerate(split.run[q]) if d == q) for q in split.found()]


def compare(scores: list[np.ndarray], baseline: list[np.ndarray], split: Split) -> dict:
    """nDCG@10 of both over all queries of the split, the paired difference, and what the likelihoods do."""
    where, total = places(split), len(split.queries)
    both = [np.pad(ndcg(s, where), (0, total - len(where))) for s in (scores, baseline)]
    difference = both[0] - both[1]

    def margin(rows) -> float:
        return float(np.mean([row[i] - np.delete(row, i).mean() for row, i in zip(rows, where, strict=True)]))

    return {
        "queries": total, "found": len(where), "ndcg": both[0].mean(), "upr": both[1].mean(),
        "difference": difference.mean(), "p": float(stats.ttest_1samp(difference, 0).pvalue) if difference.any() else 1,
        "wins": int((difference > 0).sum()), "losses": int((difference < 0).sum()),
        "margin": margin(scores), "margin_upr": margin(baseline),
        "likelihood": float(np.mean([row[i] for row, i in zip(scores, where, strict=True)])),
        "likelihood_upr": float(np.mean([row[i] for row, i in zip(baseline, where, strict=True)])),
    }  # fmt: skip


def upr(name: str, split: Split, lm, tokenizer, cache) -> list[np.ndarray]:
    """Likelihoods of the LM without clues, computed once."""
    path = FOLDER / f"upr-{name}.npz"
    if not path.exists():
        model = get_qpeft_model(lm, QPeftConfig(**FIXED | {"clues": "none"}), tokenizer)
        rows = mean_likelihoods(model, split, cache)
        np.savez(path, values=np.concatenate(rows), lengths=[len(row) for row in rows])
    stored = np.load(path)
    return np.split(stored["values"], np.cumsum(stored["lengths"])[:-1])


class Log(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        row = {k: round(v, 4) for k, v in logs.items() if k in ("loss", "eval_loss", "eval_mrr", "grad_norm")}
        if row:
            self.rows.append({"step": state.global_step} | row)
            print(self.rows[-1], flush=True)


def train(model, train_split: Split, stop_split: Split, cache: DocumentCache, o) -> list[dict]:
    examples = train_split.examples(o.negatives, o.seed, o.depth)
    found = set(stop_split.found())
    stop = [e for e in stop_split.examples(19) if e["query_id"] in found]
    every = max(1, o.steps // o.evaluations)
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "training" / o.name), per_device_train_batch_size=o.queries,
        per_device_eval_batch_size=4, max_steps=o.steps, learning_rate=o.lr, lr_scheduler_type=o.schedule,
        warmup_steps=o.steps // 20, weight_decay=o.weight_decay, eval_strategy="steps", save_strategy="steps",
        eval_steps=every, save_steps=every, save_total_limit=1, load_best_model_at_end=True,
        metric_for_best_model="mrr", greater_is_better=True, logging_steps=every, report_to="none", seed=o.seed,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    log = Log()
    trainer = QPeftTrainer(model=model, args=arguments, train_dataset=examples, eval_dataset=stop, callbacks=[log])
    trainer.cache = cache
    trainer.train()
    return log.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True)
    parser.add_argument("--option", action="append", default=[], help="NAME=VALUE of QPeftConfig")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=300, help="0 ranks with the untrained adapter")
    parser.add_argument("--queries", type=int, default=8, help="a step")
    parser.add_argument("--negatives", type=int, default=11)
    parser.add_argument("--depth", type=int, default=40, help="negatives are drawn from BM25's best")
    parser.add_argument("--evaluations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-packages", nargs="+", help="instead of those that the LM has not read")
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--lm", default=str(BASE_LM))
    o = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(o.seed)
    lm, tokenizer = load_lm(o.lm, dtype="float32"), load_tokenizer(o.lm)
    options = FIXED | {"num_hard_negatives": o.negatives, "queries_per_group": o.queries, "seed": o.seed}
    config = QPeftConfig(**options | parse_options(o.option))
    fits = Prompt(tokenizer, config).fits
    cache = DocumentCache(5 << 30)
    split = load_split(o.split, FOLDER, fits)
    baseline = upr(o.split, split, lm, tokenizer, cache)
    log, adapter = [], FOLDER / "adapters" / o.name
    if o.split == "test":
        model = QPeftModel.from_pretrained(adapter, lm, tokenizer)
    else:
        model = get_qpeft_model(lm, config, tokenizer)
        if o.steps:
            train_split = load_split("train", FOLDER, fits, o.train_packages)
            log = train(model, train_split, load_split("stop", FOLDER, fits), cache, o)
            model.save_pretrained(adapter)
    trained = time.perf_counter()
    scores = mean_likelihoods(model.eval(), split, cache)
    np.savez(FOLDER / f"scores-{o.split}-{o.name}.npz", values=np.concatenate(scores))
    result = compare(scores, baseline, split)
    row = {"name": o.name, "split": o.split, "command": " ".join(sys.argv[1:])}
    row |= {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
    row |= {"trained": model.get_nb_trainable_parameters()[0], "seconds_training": round(trained - started),
            "seconds_ranking": round(time.perf_counter() - trained), "log": log}  # fmt: skip
    with open(FOLDER / "results.jsonl", "a") as file:
        file.write(json.dumps(row, default=float) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "log"}, indent=1, default=float))


if __name__ == "__main__":
    main()
