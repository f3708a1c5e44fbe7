"""Text for a base LM that reads English: passages of real collections, and questions that no experiment uses.

The data root holds BEIR folders, and in quality/ what `benchmarks/quality/make_collections.py` writes. All passages are
read, of test collections too (a reranker is given them anyway); of the questions only those of `QUESTIONS`.
"""

from __future__ import annotations

from pathlib import Path

from qpeft_ext import formats

PASSAGES = ("squad", "dl19", "msmarco-train2000", "scifact", "cosqa", "cranfield")
QUESTIONS = {"squad": ("quality/squad-choose", "lm")}  # half of the training articles: adapters train on the others


def passage_texts(root: Path) -> list[tuple[str, str, list[str]]]:
    """Return title, text and questions of every passage of the collections.

    Raises: FileNotFoundError for a folder that is missing.
    """
    texts = []
    for name in PASSAGES:
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"{root / name} is not there; --passages expects a folder with {', '.join(PASSAGES)}"
            )
        asked: dict[str, list[str]] = {}
        if name in QUESTIONS:
            folder, split = QUESTIONS[name]
            data = formats.open_collection(str(root / folder))
            queries = data.queries(split)
            for query, judged in data.qrels(split).items():
                for document, grade in judged.items():
                    if grade > 0:
                        asked.setdefault(document, []).append(queries[query])
        corpus = formats.Corpus(root / name)
        texts += [(corpus[id].get("title", ""), corpus[id]["text"], asked.get(id, [])) for id in corpus]
    return texts
