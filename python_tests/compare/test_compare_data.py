"""`qpeft compare`: rows of some collections only, adapters that several share, training data, methods that fail."""

import json
import shutil

import pytest
from jobs.compare_job import METHODS, assert_same_runs, compare, write_plan

from qpeft_ext import formats
from qpeft_ext.compare.plan_file import read_plan
from qpeft_ext.compare.run import Comparison
from qpeft_ext.compare.tables import build_tables

pytest.importorskip("peft")
pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def test_training_reads_prefixes_from_the_cache(job, tmp_path, monkeypatch):
    from qpeft_ext.training import trainer as train

    budgets, init = [], train.QPeftTrainer.__init__

    def spy(self, *args, cache=None, **options):
        budgets.append(cache.max_bytes)
        init(self, *args, cache=cache, **options)

    monkeypatch.setattr(train.QPeftTrainer, "__init__", spy)
    plan = write_plan(
        tmp_path / "plan.yaml", job, ["A: {method: q_peft_a, learning_rate: 1e-2}"], **{"seeds: [0, 1]": "seeds: [0]"}
    )
    assert compare(plan, job, tmp_path / "out") == 0 and budgets == [1_000_000]


def test_a_collection_may_have_some_of_the_rows(job, tmp_path, capsys):
    """A fusion brings what it takes, a name what ``vary`` makes of it; what another collection lacks is no mistake."""
    wide = "    data: data\n    split: test\n"
    some = {
        "collections:": "collections:\n  more: {data: data, split: test, candidates: 9, methods: [LoRA + BM25, "
        "UPR], train: {data: data, split: train}, dev: {data: data, split: dev}}\n  less: {data: "
        "data, split: test, candidates: 3, methods: [UPR]}",
        "seeds: [0, 1]": "seeds: [0]",
        wide: wide + "    methods: [Q-PEFT-A]\n",
    }
    plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **some)
    assert compare(plan, job, tmp_path / "out") == 0
    tables = {
        table["collection"]: [row["method"] for row in table["rows"]]
        for table in json.loads((tmp_path / "out" / "comparison.json").read_text())
    }
    assert tables == {
        "more": ["first stage", "UPR", "LoRA", "LoRA + BM25"],
        "less": ["first stage", "UPR"],
        "tiny": ["first stage", "Q-PEFT-A", "Q-PEFT-A, queries=2"],
    }
    assert [
        row["seeds"] for table in build_tables(read_plan(plan), tmp_path / "out") for row in map(vars, table.rows)
    ] == [1] * 9
    write_plan(plan, job, METHODS, **some | {wide: wide + "    methods: [Q-PEFT-B]\n"})
    capsys.readouterr()
    assert compare(plan, job, tmp_path / "out") == 2
    assert (
        "plan.yaml: collections.tiny.methods: there is no method 'Q-PEFT-B'; did you mean 'Q-PEFT-A'?"
        in capsys.readouterr().err
    )


def test_an_adapter_serves_all_collections_that_would_train_it(job, tmp_path, capsys):
    """Two test collections, one training set: the method is trained once, also where they are made one by one."""
    collections = {
        "collections:": "collections:\n  other: {data: data, split: dev, candidates: 6, train: {data: data, "
        "split: train}}\n  half: {data: data, split: test, candidates: 6, train: "
        "{data: data, split: train, queries: 2}}",
        "seeds: [0, 1]": "seeds: [0]",
    }
    plan = write_plan(tmp_path / "plan.yaml", job, ["A: {method: q_peft_a, learning_rate: 1e-2}"], **collections)
    out = tmp_path / "out"
    assert compare(plan, job, out, "--collection", "tiny") == 0
    assert compare(plan, job, out) == 0
    said = capsys.readouterr().out
    assert said.count("trained in") == 2 and "other, A, seed 0: trained for tiny already" in said
    trained, taken, half = (out / name / "A" / "seed-0" for name in ("tiny", "other", "half"))
    weights = "adapter/adapter_model.safetensors"
    assert (trained / weights).read_bytes() == (taken / weights).read_bytes() != (half / weights).read_bytes()
    facts = [json.loads((place / "result.json").read_text())["training"] for place in (trained, taken)]
    assert facts[1] == {"trained_for": "tiny"} | facts[0]
    run = formats.read_run(taken / "run.trec.gz")
    shutil.rmtree(trained / "adapter")  # as where results alone were kept: it is trained again
    shutil.rmtree(out / "other")
    assert compare(plan, job, out, "--collection", "other") == 0
    assert "trained_for" not in json.loads((taken / "result.json").read_text())["training"]
    assert_same_runs({"A": formats.read_run(taken / "run.trec.gz")}, {"A": run})


def test_a_method_that_fails_does_not_stop_the_others(job, tmp_path, capsys):
    bad = "odd LoRA: {method: lora, learning_rate: 1e-2, peft: {target_modules: [nowhere]}}"
    others = ["UPR: {method: upr}", "sim: {method: similarity}", "sim + BM25: {method: fusion, of: sim}"]
    plan = write_plan(tmp_path / "plan.yaml", job, [bad, *others], **{"seeds: [0, 1]": "seeds: [0]"})
    assert compare(plan, job, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "1 result could not be made; the first: tiny, odd LoRA" in captured.err
    assert "nowhere" in captured.err and "UPR" in (tmp_path / "out" / "comparison.md").read_text()
    assert compare(plan, job, tmp_path / "out", "--method", "UPR") == 0
    dev = formats.read_run(tmp_path / "out" / "tiny" / "sim-+-BM25" / "seed-0" / "dev.trec.gz")
    assert all(0 < score <= 10 for ranking in dev.values() for _, score in ranking)  # cosines, not likelihoods


def test_nothing_is_trained_on_test_or_dev_queries(job, tmp_path):
    whole = write_plan(tmp_path / "plan.yaml", job, METHODS)
    assert list(read_plan(whole, collections=["tiny"]).collections) == ["tiny"]
    plan = read_plan(
        write_plan(
            tmp_path / "one_split.yaml",
            job,
            METHODS,
            **{
                "split: test\n    candidates": "split: train\n    queries: 3\n    candidates",
                "split: dev": "split: train, queries: 4",
            },
        )
    )
    data = Comparison(plan, job, tmp_path / "out", "cpu").data("tiny")
    training = plan.methods["LoRA"].training
    few, more = (data.examples("train", training.__class__(n, 2, 8, 2), 0) for n in (2, 5))
    test, dev = set(data.test.queries), set(data.dev.queries)
    assert len(test) == 3 and len(dev) == 4 and not test & dev
    assert {e["query_id"] for e in few} < {e["query_id"] for e in more}  # a learning curve adds queries
    assert not {e["query_id"] for e in more} & (test | dev)
    with pytest.raises(ValueError, match="6 training queries were asked for, there are 5"):
        data.examples("train", training.__class__(6, 2, 8, 2), 0)
    capped = read_plan(
        write_plan(
            tmp_path / "capped.yaml",
            job,
            METHODS,
            **{
                "split: test\n    candidates": "split: train\n    queries: 3\n    candidates",
                "train: {data: data, split: train}": "train: {data: data, split: train, queries: 5}",
                "split: dev": "split: train, queries: 4",
            },
        )
    )
    data = Comparison(capped, job, tmp_path / "out", "cpu").data("tiny")
    assert data.examples("train", training.__class__(6, 2, 8, 2), 0) == more
