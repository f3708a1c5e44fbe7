"""The files and Python names that the snippets of the documentation find: a collection of a dozen functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from small_data import write_lines

import qpeft_ext

DEMO = Path(qpeft_ext.__file__).parent / "demo"
SOURCES = {  # what is asked for -> the function, as in the data of the demo
    "Return the largest element of a list": "def largest(values):\n    best = values[0]\n"
    "    for value in values:\n        if value > best:\n            best = value\n    return best",
    "Read a text file and return its lines": "def read_lines(path):\n    with open(path) as file:\n"
    "        return file.read().splitlines()",
    "Write an object to a file as JSON": "def save(data, path):\n    with open(path, 'w') as file:\n"
    "        json.dump(data, file)",
    "Count how often each word occurs in a text": "def word_counts(text):\n    counts = {}\n"
    "    for word in text.split():\n        counts[word] = counts.get(word, 0) + 1\n    return counts",
    "Return the greatest common divisor of two numbers": "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n"
    "    return a",
    "Close the connection to the server": "def close(self):\n    if self.socket is not None:\n"
    "        self.socket.close()\n        self.socket = None",
    "Remove duplicates from a list and keep its order": "def unique(items):\n    seen = set()\n"
    "    return [item for item in items if not (item in seen or seen.add(item))]",
    "Convert degrees Celsius to Fahrenheit": "def fahrenheit(celsius):\n    return celsius * 9 / 5 + 32",
    "Return the mean of a list of numbers": "def mean(numbers):\n    return sum(numbers) / len(numbers)",
    "List the names of the files in a folder": "def file_names(folder):\n"
    "    return sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name)))",
    "Merge two dictionaries": "def merged(first, second):\n    result = dict(first)\n    result.update(second)\n"
    "    return result",
    "Wait until a condition holds or time is over": "def wait_for(condition, timeout):\n"
    "    end = time.time() + timeout\n    while not condition():\n        if time.time() > end:\n"
    "            raise TimeoutError\n        time.sleep(0.1)",
}
QUERIES, DOCUMENTS = list(SOURCES), list(SOURCES.values())
SPLITS = {"test": range(0, 4), "train": range(4, 12), "dev": range(4, 8)}


def examples(places: range) -> list[dict]:
    """Training examples with two negatives each."""
    count = len(DOCUMENTS)
    return [
        {
            "query": QUERIES[i],
            "positives": [DOCUMENTS[i]],
            "negatives": [DOCUMENTS[(i + 1) % count], DOCUMENTS[(i + 5) % count]],
        }
        for i in places
    ]


def write_collection(folder: Path) -> None:
    """A BEIR folder."""
    write_lines(
        folder / "corpus.jsonl",
        (json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in enumerate(DOCUMENTS)),
    )
    write_lines(
        folder / "queries.jsonl", (json.dumps({"_id": f"q{i}", "text": text}) for i, text in enumerate(QUERIES))
    )
    for split, places in SPLITS.items():
        rows = (f"q{i}\td{i}\t1" for i in places)
        write_lines(folder / "qrels" / f"{split}.tsv", ["query-id\tcorpus-id\tscore", *rows])


def write_candidates(path: Path) -> None:
    """Candidates with their texts, as RankLLM writes them."""
    write_lines(
        path,
        (
            json.dumps(
                {
                    "query": {"qid": f"q{i}", "text": QUERIES[i]},
                    "candidates": [
                        {"docid": f"d{j}", "score": 12.0 - rank, "doc": {"contents": DOCUMENTS[j]}}
                        for rank, j in enumerate(range(i, i + 6))
                    ],
                }
            )
            for i in SPLITS["test"]
        ),
    )


def write_files(folder: Path) -> None:
    """All files that a page may name, see the list in `test_snippets.py`."""
    from qpeft_ext.cli import main

    write_collection(folder / "COLLECTION")
    write_lines(folder / "examples.jsonl", map(json.dumps, examples(SPLITS["train"])))
    write_lines(folder / "dev.jsonl", map(json.dumps, examples(SPLITS["dev"])))
    write_candidates(folder / "candidates.jsonl")
    (folder / "LM").symlink_to(DEMO / "base_lm")
    shutil.copytree(DEMO / "adapter", folder / "my-adapter")
    config = folder / "my-adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "LM"}))
    collection = str(folder / "COLLECTION")
    assert main(["retrieve", "--data", collection, "--output", str(folder / "bm25.trec")]) == 0
    index = ["--out", str(folder / "my-index"), "--model", str(folder / "my-adapter")]
    assert main(["index", collection, *index, "--base-model", str(folder / "LM")]) == 0


def data_names() -> dict:
    """Python names that hold data."""
    return {
        "query": QUERIES[0],
        "document": DOCUMENTS[0],
        "documents": list(DOCUMENTS),
        "queries": QUERIES[:2],
        "candidates": [DOCUMENTS[:6], DOCUMENTS[6:]],
        "examples": examples(SPLITS["train"]),
        "dev_examples": examples(SPLITS["dev"]),
    }


def model_names(wanted: set[str]) -> dict:
    """``lm``, ``model`` and ``reranker``, those that are wanted: the packaged LM and adapter."""
    names = {}
    if wanted & {"model", "reranker"}:
        names["model"] = qpeft_ext.QPeftModel.from_pretrained(DEMO / "adapter", DEMO / "base_lm")
    if "reranker" in wanted:
        names["reranker"] = qpeft_ext.Reranker(names["model"])
    if "lm" in wanted:
        names["lm"] = qpeft_ext.load_lm(DEMO / "base_lm")
    return names
