"""Do spans hold the answer? The best sentence of `Reranker.spans` on SQuAD, against baselines without an LM.

    python benchmarks/quality/spans.py --data DATA/squad --lm LM --questions 200 --out results/spans_squad.json

For each question of a split its own paragraph is read. The best sentence of the LM (without an adapter) is compared
with the first one, the one with most words of the question, and BM25's best among the sentences. "hit" is whether it
holds one of the answers as written, "f1" the largest F1 of its words and those of an answer. p-values are of a paired
permutation test, with Holm's correction. The file is written every ten questions.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qpeft_ext import QPeftConfig, Reranker, get_qpeft_model, load_lm
from qpeft_ext.evaluation.significance import holm, paired_test
from qpeft_ext.formats import open_collection
from qpeft_ext.prompts.sentences import sentence_spans
from qpeft_ext.ranking.first_stage import BM25
from qpeft_ext.utils.environment import versions
from qpeft_ext.utils.files import write_text

OURS, MEASURES = "LM", ("hit", "f1")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def hit(sentence: str, answers: Sequence[str]) -> float:
    """1 if an answer stands in the sentence as it is written."""
    return float(any(answer in sentence for answer in answers))


def f1(sentence: str, answers: Sequence[str]) -> float:
    """The largest F1 of the words of the sentence and those of an answer."""
    found, best = Counter(words(sentence)), 0.0
    for answer in answers:
        wanted = Counter(words(answer))
        if common := sum((found & wanted).values()):
            best = max(best, 2 * common / (sum(found.values()) + sum(wanted.values())))
    return best


def most_words(question: str, sentences: Sequence[str]) -> str:
    """The sentence with most distinct words of the question; the earlier one of two."""
    asked = set(words(question))
    return max(sentences, key=lambda sentence: len(asked & set(words(sentence))))


def best_by_bm25(question: str, sentences: Sequence[str]) -> str:
    """BM25's best sentence, with the counts of this paragraph; the first one where no word is shared."""
    index = BM25({str(i): {"text": sentence} for i, sentence in enumerate(sentences)}, show_progress_bar=False)
    found = index.search(question, 1)
    return sentences[int(found[0][0])] if found else sentences[0]


BASELINES: dict[str, Callable[[str, Sequence[str]], str]] = {
    "first sentence": lambda question, sentences: sentences[0],
    "question words": most_words,
    "BM25": best_by_bm25,
}


def summary(rows: Sequence[dict]) -> dict:
    """Means of each system and measure, and Holm-corrected p-values of each baseline against the LM."""
    table: dict = {}
    for measure in MEASURES:
        values = {name: {row["question"]: row[name][measure] for row in rows} for name in (OURS, *BASELINES)}
        p = holm([paired_test(values[OURS], values[name], "permutation") for name in BASELINES])
        table[measure] = {
            "means": {name: float(np.mean(list(of.values()))) for name, of in values.items()},
            "p": dict(zip(BASELINES, p, strict=True)),
        }
    return table


def _answers(folder: str) -> dict[str, list[str]]:
    """Answers by question, which stand in queries.jsonl.gz beside the BEIR fields."""
    with gzip.open(Path(folder) / "queries.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {row["_id"]: row["answers"] for row in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--lm", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    collection = open_collection(options.data)
    qrels, queries, answers = collection.qrels(options.split), collection.queries(options.split), _answers(options.data)
    drawn = random.Random(options.seed).sample(sorted(qrels), options.questions)
    lm = load_lm(options.lm, dtype=options.dtype)
    reranker = Reranker(get_qpeft_model(lm, QPeftConfig(clues="none")), truncate_queries=True)
    rows: list[dict] = []
    begin, skipped = time.perf_counter(), 0
    for question_id in drawn:
        question, document = queries[question_id], collection.corpus[next(iter(qrels[question_id]))]
        sentences = [document["text"][start:end] for start, end in sentence_spans(document["text"])]
        if len(sentences) < 2:
            skipped += 1
            continue
        (best,) = reranker.spans(question, document, threshold=0, max_spans=1)
        picks = {name: pick(question, sentences) for name, pick in BASELINES.items()} | {OURS: best.text}
        of = answers[question_id]
        measured = {name: {"hit": hit(text, of), "f1": round(f1(text, of), 4)} for name, text in picks.items()}
        rows.append({"question": question_id, "score": round(best.score, 4), **measured})
        if len(rows) % 10 == 0 or question_id == drawn[-1]:
            result = {
                "command": f"python benchmarks/quality/spans.py --data squad --split {options.split} --questions "
                f"{options.questions} --seed {options.seed}",
                "lm": Path(options.lm).name,
                "versions": versions(("torch", "transformers")),
                "questions": len(rows),
                "one_sentence": skipped,
                "seconds": round(time.perf_counter() - begin, 1),
                **summary(rows),
                "rows": rows,
            }
            write_text(options.out, json.dumps(result, indent=1) + "\n")
            print(len(rows), json.dumps({measure: result[measure] for measure in MEASURES}), flush=True)


if __name__ == "__main__":
    main()
