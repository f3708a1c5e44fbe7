"""The collections of the quality experiments that are not downloads, as BEIR folders for `qpeft compare`.

    python benchmarks/quality/make_collections.py --data-root DATA     # writes DATA/quality/…

docstrings-a, docstrings-b: functions and docstrings of the packages that the packaged LM has not read, split in two by
    package, so that a choice is made twice: trained on the one half, measured on the other.
docstrings-train: both halves.  docstrings-read: the demo's training packages, which the LM has read.
docstrings-test: the demo's test packages, without the 1,000 queries that earlier experiments have scored (NOTES.md).
squad-choose: SQuAD's training questions; six articles are kept back (split "dev") to choose by; the others ("train")
    are split in two by article: "lm", which a base LM may have read, and "adapter".
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
from pathlib import Path

from qpeft_ext.config import QPeftConfig
from qpeft_ext.demo import harvest
from qpeft_ext.demo.settings import MAX_QUERY_TOKENS
from qpeft_ext.lm.loading import BASE_LM, load_tokenizer
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.utils.files import write_text

# Installed beside torch and the tests, and in none of the demo's lists: the packaged LM has not read them.
UNREAD_PACKAGES = (
    "_pytest", "build", "cpuinfo", "functorch", "h11", "httpcore2", "httpx2", "hypothesis", "idna", "pluggy",
    "pybind11", "pydantic", "pydantic_core", "pyproject_hooks", "pytest_benchmark", "sortedcontainers", "torchgen",
    "truststore", "typing_inspection", "yaml",
)  # fmt: skip
SCORED_QUERIES = 1000  # of the test packages, by the first round of experiments
KEPT_BACK_ARTICLES = 6


def halves(packages: list[str], sizes: dict[str, int]) -> tuple[list[str], list[str]]:
    """Two lists of packages with about as many queries: largest first, each to the half that has fewer."""
    sides: tuple[list[str], list[str]] = ([], [])
    for package in sorted(packages, key=lambda p: (-sizes[p], p)):
        smaller = min(sides, key=lambda side: sum(sizes[p] for p in side))
        smaller.append(package)
    return sides


def write_docstrings(root: Path) -> None:
    packages = sorted({*UNREAD_PACKAGES, *harvest.DEV_PACKAGES})
    sizes = {p: len(harvest.harvest([p], show_progress_bar=False).queries) for p in packages}
    a, b = halves(packages, sizes)
    for name, part in (("a", a), ("b", b), ("train", packages)):
        collection = harvest.harvest(part, show_progress_bar=False)
        folder = harvest.write_beir(collection, root / f"docstrings-{name}")
        largest = ", ".join(sorted(part, key=lambda p: -sizes[p])[:4])
        print(f"{folder}: {len(collection.queries)} queries, {len(part)} packages, the largest: {largest}")
    read = harvest.demo_collection(show_progress_bar=False).train
    print(f"{harvest.write_beir(read, root / 'docstrings-read')}: {len(read.queries)} queries")
    write_test(root)


def write_test(root: Path) -> None:
    collection = harvest.harvest(harvest.TEST_PACKAGES, show_progress_bar=False)
    config = QPeftConfig(clues="none", max_document_tokens=160, max_query_tokens=MAX_QUERY_TOKENS)
    fits = Prompt(load_tokenizer(str(BASE_LM)), config).fits
    usable = sorted(q for q, text in collection.queries.items() if fits(text))
    scored = set(random.Random(0).sample(usable, SCORED_QUERIES))  # as the first round drew them
    collection.queries = {q: collection.queries[q] for q in usable if q not in scored}
    collection.qrels = {q: collection.qrels[q] for q in collection.queries}
    folder = harvest.write_beir(collection, root / "docstrings-test")
    print(f"{folder}: {len(collection.queries)} queries that nobody has scored")


def write_squad(source: Path, folder: Path) -> None:
    """The paragraphs as they are; a training question belongs to "dev" if its article is kept back."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name in ("corpus.jsonl.gz", "queries.jsonl.gz"):
        shutil.copyfile(source / name, folder / name)
    with gzip.open(source / "corpus.jsonl.gz", "rt") as file:
        article = {row["_id"]: row["title"] for row in map(json.loads, file)}
    with gzip.open(source / "qrels" / "train.tsv.gz", "rt") as file:
        header, *rows = file.read().splitlines()
    titles = sorted({article[row.split("\t")[1]] for row in rows})
    kept_back = random.Random(0).sample(titles, KEPT_BACK_ARTICLES)
    others = [title for title in titles if title not in kept_back]
    splits = {"train": others, "dev": kept_back, "lm": others[::2], "adapter": others[1::2]}
    for split, wanted in splits.items():
        chosen = [row for row in rows if article[row.split("\t")[1]] in wanted]
        write_text(folder / "qrels" / f"{split}.tsv", "".join(f"{row}\n" for row in (header, *chosen)))
        print(f"{folder}, {split}: {len(chosen)} questions")
    print("kept back:", ", ".join(sorted(kept_back)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="holds the BEIR folder squad")
    root = parser.parse_args().data_root
    write_docstrings(root / "quality")
    if (root / "squad").is_dir():
        write_squad(root / "squad", root / "quality" / "squad-choose")
    else:
        print(f"{root / 'squad'} is not there: squad-choose is left out")


if __name__ == "__main__":
    main()
