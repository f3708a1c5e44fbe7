"""The collections of the quality experiments: nothing of a test, or of what is kept back, is trained on."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "quality"))

make = pytest.importorskip("make_collections")
kept = pytest.importorskip("results")

from small_data import write_lines  # noqa: E402

from qpeft_ext import formats  # noqa: E402
from qpeft_ext.compare.plan import file_name  # noqa: E402
from qpeft_ext.demo import harvest  # noqa: E402


def test_the_test_queries_are_none_that_were_scored(monkeypatch, tmp_path):
    ids = [f"p{i}" for i in range(30)]
    documents = {id: {"id": id, "title": id, "text": f"{id} text"} for id in ids}

    def read(packages, show_progress_bar):
        assert packages == harvest.TEST_PACKAGES
        return harvest.Collection(documents, {id: f"query of {id}" for id in ids}, {id: {id: 1} for id in ids}, {}, {})

    monkeypatch.setattr(harvest, "harvest", read)
    monkeypatch.setattr(make, "SCORED_QUERIES", 10)
    make.write_test(tmp_path)
    data = formats.open_collection(str(tmp_path / "docstrings-test"))
    scored = random.Random(0).sample(sorted(ids), 10)
    assert sorted(data.queries("test")) == sorted(set(ids) - set(scored))


def test_unread_packages_are_in_no_list_of_the_demo():
    demo = {*harvest.TRAIN_PACKAGES, *harvest.DEV_PACKAGES, *harvest.TEST_PACKAGES}
    assert demo.isdisjoint(make.UNREAD_PACKAGES)


def test_halves_have_about_as_many_queries():
    a, b = make.halves(list("edcba"), {"a": 10, "b": 6, "c": 5, "d": 1, "e": 1})
    assert (a, b) == (["a", "d", "e"], ["b", "c"])


def test_articles_are_kept_back_whole(tmp_path):
    source, folder = tmp_path / "squad", tmp_path / "choose"
    corpus = [json.dumps({"_id": f"p{i}", "title": f"article {i // 3}", "text": f"text {i}"}) for i in range(30)]
    write_lines(source / "corpus.jsonl.gz", corpus)
    write_lines(source / "queries.jsonl.gz", [json.dumps({"_id": f"q{i}", "text": f"what {i}"}) for i in range(60)])
    rows = [f"q{i}\tp{i // 2}\t1" for i in range(54)]  # the last three paragraphs have no training question
    write_lines(source / "qrels" / "train.tsv.gz", ["query-id\tcorpus-id\tscore", *rows])
    make.write_squad(source, folder)
    splits = ("train", "dev", "lm", "adapter")
    found = {split: (folder / "qrels" / f"{split}.tsv").read_text().splitlines()[1:] for split in splits}
    assert sorted(found["train"] + found["dev"]) == sorted(rows)
    assert sorted(found["lm"] + found["adapter"]) == sorted(found["train"])
    articles = {split: {int(row.split("\t")[1][1:]) // 3 for row in part} for split, part in found.items()}
    assert not articles["train"] & articles["dev"] and len(articles["dev"]) == 6
    assert articles["lm"] and articles["adapter"] and not articles["lm"] & articles["adapter"]
    assert formats.Corpus(folder)["p7"]["text"] == "text 7"


def test_results_are_packed_and_unpacked(tmp_path):
    """All files but runs and adapters are packed; unpacking keeps those that exist."""
    found = {}
    for method, seed, value in (("UPR", 0, 0.25), ("Q-PEFT-R, gated", 0, 0.5), ("Q-PEFT-R, gated", 1, 1 / 3)):
        result = {
            "collection": "SQuAD 100",
            "method": method,
            "seed": seed,
            "settings": {"method": method},
            "per_query": {"nDCG@10": {"é1": value}},
        }
        folder = tmp_path / "there" / file_name("SQuAD 100") / file_name(method) / f"seed-{seed}"
        write_lines(folder / "result.json", [json.dumps(result)])
        write_lines(folder / "run.trec.gz", ["a run"])
        found[method, seed] = result
    file = tmp_path / "results.jsonl.xz"
    assert kept.pack(tmp_path / "there", file) == 3
    first = file.read_bytes()
    kept.pack(tmp_path / "there", file)
    assert file.read_bytes() == first and not list(tmp_path.glob("*.partial"))
    here = tmp_path / "here"
    mine = here / file_name("SQuAD 100") / file_name("UPR") / "seed-0" / "result.json"
    write_lines(mine, ['{"mine": true}'])
    assert kept.unpack(file, here) == 2 and json.loads(mine.read_text()) == {"mine": True}
    for seed in (0, 1):
        folder = here / file_name("SQuAD 100") / file_name("Q-PEFT-R, gated") / f"seed-{seed}"
        assert json.loads((folder / "result.json").read_text()) == found["Q-PEFT-R, gated", seed]
        assert json.loads((folder / "settings.json").read_text()) == {"method": "Q-PEFT-R, gated"}
    assert kept.unpack(file, here) == 0
    with pytest.raises(SystemExit, match="no results"):
        kept.pack(tmp_path / "nothing", file)
    assert file.read_bytes() == first
    (tmp_path / "half").write_bytes(first[: len(first) // 2])
    for bad in ("half", "nothing"):
        with pytest.raises(SystemExit, match=f"{bad}: expected results that this script has packed"):
            kept.unpack(tmp_path / bad, here)
