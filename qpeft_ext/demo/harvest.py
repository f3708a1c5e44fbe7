"""Search collections made of the Python environment that this runs in, without a network.

    query     the first sentence of the docstring of a function or class
    document  its source without docstrings; the title is the qualified name

The same environment gives the same collection. The title gives nothing away: the source names the definition anyway
(``def shortest_path(``), and the title adds the module and the class, as every search in code does.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..utils.files import write_text
from .definitions import STANDARD_LIBRARY, Definition, iter_definitions, locations
from .sentences import first_sentence

TRAIN_PACKAGES = (
    STANDARD_LIBRARY, "torch", "transformers", "numpy", "scipy", "sympy", "peft", "setuptools", "pip", "fontTools",
    "jinja2", "markdown_it", "fsspec", "filelock", "packaging", "click", "typer", "dateutil", "PIL",
    "safetensors", "tokenizers", "regex", "contourpy", "psutil", "httpx", "anyio",
)  # fmt: skip
DEV_PACKAGES = ("mpmath", "huggingface_hub", "pygments", "pyparsing")  # for choosing; nothing is trained on them
TEST_PACKAGES = ("networkx", "matplotlib", "mpl_toolkits", "accelerate", "rich", "tqdm", "bm25s", "ir_measures")
TEST_QUERIES, DEV_QUERIES = 100, 100


@dataclass
class Collection:
    """A search collection.

    Attributes:
        documents: doc_id -> {"id", "title", "text"}.
        queries: query_id -> text.
        qrels: query_id -> {doc_id: 1}.
        versions: package -> version.
        counts: how much was read, kept and dropped.
    """

    documents: dict[str, dict[str, str]]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    versions: dict[str, str]
    counts: dict[str, int]


@dataclass
class DemoCollection:
    """Three collections, of different packages, with different documents and queries."""

    train: Collection
    dev: Collection
    test: Collection


def harvest(
    packages: Sequence[str], search_path: Sequence[str] | None = None, show_progress_bar: bool | None = None
) -> Collection:
    """Make a collection of all documented definitions in packages.

    Args:
        packages: top-level names; ``"stdlib"`` is the whole standard library. Packages that are not installed are
            counted.
        search_path: folders to look in instead of ``sys.path``.
        show_progress_bar: None shows it when the output is a terminal.
    """
    counts: Counter[str] = Counter()
    definitions = iter_definitions(packages, counts, search_path, show_progress_bar)
    return collect(definitions, package_versions(packages, search_path), counts)


def demo_collection(
    seed: int = 0, test_queries: int = TEST_QUERIES, show_progress_bar: bool | None = None
) -> DemoCollection:
    """Make the demo's collections, which are split by package.

    A definition that the test or dev packages contain too is no training document.

    Args:
        seed: seed of the samples of queries.
        test_queries: how many test queries are sampled; of dev queries, `DEV_QUERIES` are.
        show_progress_bar: None shows it when the output is a terminal.
    """
    held_out: set[bytes] = set()
    sides = []
    for packages, wanted in ((TEST_PACKAGES, test_queries), (DEV_PACKAGES, DEV_QUERIES), (TRAIN_PACKAGES, None)):
        counts: Counter[str] = Counter()
        definitions = list(iter_definitions(packages, counts, None, show_progress_bar))
        own = [definition for definition in definitions if definition.digest not in held_out]
        counts["also_in_held_out_packages"] = len(definitions) - len(own)
        held_out.update(definition.digest for definition in definitions)
        sides.append(sample_queries(collect(own, package_versions(packages), counts), wanted, seed))
    test, dev, train = sides
    return DemoCollection(train, dev, test)


def collect(definitions: Iterable[Definition], versions: dict[str, str], counts: Counter[str]) -> Collection:
    """Deduplicate documents by syntax tree, then drop the queries that occur more than once (their documents stay)."""
    documents: dict[str, dict[str, str]] = {}
    sentences: dict[str, str] = {}
    seen: set[bytes] = set()
    for definition in definitions:
        if definition.digest in seen or definition.name in documents:
            counts["duplicate_documents"] += 1
            continue
        seen.add(definition.digest)
        documents[definition.name] = {"id": definition.name, "title": definition.name, "text": definition.source}
        sentence = first_sentence(definition.docstring)
        if sentence is None:
            counts["unusable_docstrings"] += 1
        else:
            sentences[definition.name] = sentence
    times = Counter(sentence.lower() for sentence in sentences.values())
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    for name, sentence in sentences.items():
        if times[sentence.lower()] == 1:
            queries[name] = sentence  # with the id of its document: readable, and stable when packages are added
            qrels[name] = {name: 1}
    counts["repeated_queries"] = len(sentences) - len(queries)
    counts["documents"], counts["queries"] = len(documents), len(queries)
    return Collection(documents, queries, qrels, versions, dict(counts))


def write_beir(collection: Collection, folder: str | Path) -> Path:
    """Write ``corpus.jsonl``, ``queries.jsonl``, ``qrels/test.tsv`` and ``versions.json``. Returns: the folder."""
    folder = Path(folder)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = ({"_id": id, "title": d["title"], "text": d["text"]} for id, d in collection.documents.items())
    queries = ({"_id": id, "text": text} for id, text in collection.queries.items())
    rows = [f"{query}\t{id}\t{grade}" for query, judged in collection.qrels.items() for id, grade in judged.items()]
    recorded = {"versions": collection.versions, "counts": collection.counts}
    for name, lines in (
        ("corpus.jsonl", (json.dumps(row) for row in corpus)),
        ("queries.jsonl", (json.dumps(row) for row in queries)),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", *rows]),
        ("versions.json", [json.dumps(recorded, indent=1)]),
    ):
        write_text(folder / name, "".join(f"{line}\n" for line in lines), follow=False)
    return folder


def package_versions(packages: Sequence[str], search_path: Sequence[str] | None = None) -> dict[str, str]:
    """Return the versions of the packages that are installed; "?" for a package without metadata."""
    distributions = importlib.metadata.packages_distributions() if search_path is None else {}
    versions = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            versions[package] = platform.python_version()
        elif locations(package, search_path):
            names = distributions.get(package, ())
            versions[package] = importlib.metadata.version(names[0]) if names else "?"
    return versions


def sample_queries(collection: Collection, wanted: int | None, seed: int) -> Collection:
    """Keep ``wanted`` queries, taken at random; None keeps all."""
    if wanted is None or wanted >= len(collection.queries):
        return collection
    chosen = sorted(random.Random(seed).sample(sorted(collection.queries), wanted))
    queries = {id: collection.queries[id] for id in chosen}
    qrels = {id: collection.qrels[id] for id in chosen}
    counts = collection.counts | {"sampled_queries": wanted}
    return Collection(collection.documents, queries, qrels, collection.versions, counts)
