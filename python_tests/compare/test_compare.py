"""`qpeft compare`: a tiny plan from the YAML to the page, resuming, tables by hand, bad plans."""

import csv
import io
import json
import os
import shutil
import signal
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from evaluation.test_report import Tags
from jobs.compare_job import make_compare_job, write_plan
from jobs.long_job import Process

from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.compare.notes import quality_notes
from qpeft_ext.compare.plan_file import read_plan
from qpeft_ext.compare.tables import build_tables
from qpeft_ext.compare.texts import csv_text, markdown
from qpeft_ext.evaluation.measures import evaluate, per_query

pytest.importorskip("peft")
pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")

METHODS = [
    "UPR: {method: upr}",
    "hard clues: {method: hard_clues, options: {k: 3}}",
    "similarity: {method: similarity}",
    "LoRA: {method: lora, learning_rate: 1e-2, peft: {r: 2}}",
    "Q-PEFT-A: {method: q_peft_a, learning_rate: 1e-2, vary: {training.queries: [2]}}",
    "LoRA + BM25: {method: fusion, of: LoRA}",
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_compare_job(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """Plan and results of the whole comparison, which nothing happened to."""
    folder = tmp_path_factory.mktemp("done")
    plan = write_plan(folder / "plan.yaml", job, METHODS)
    assert compare(plan, job, folder / "out") == 0
    return folder


def compare(plan, job, output, *options) -> int:
    return main(command(plan, job, output, *options))


def command(plan, job, output, *options) -> list[str]:
    return [
        "compare",
        str(plan),
        "--data-root",
        str(job),
        "--output",
        str(output),
        "--device",
        "cpu",
        *map(str, options),
    ]


def results(output) -> dict:
    """(method, seed) -> result."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*/*/*/result.json"))]
    return {(result["method"], result["seed"]): result for result in found}


def runs(output) -> dict:
    return {
        path.parent.relative_to(output).as_posix(): formats.read_run(path)
        for path in sorted(output.glob("*/*/*/run.trec.gz"))
    }


def assert_same_runs(ours, theirs, most: float = 1e-4) -> None:
    """Same candidates, scores to ``most``."""
    assert ours.keys() == theirs.keys()
    for name, run in ours.items():
        assert {q: dict(r) for q, r in run.items()} == {
            q: pytest.approx(dict(r), abs=most) for q, r in theirs[name].items()
        }, name


# -- the whole of it -------------------------------------------------------------------------------------------------


def test_what_is_made(done):
    found = results(done / "out")
    seeds = {name: sorted(seed for method, seed in found if method == name) for name, _ in found}
    once, twice = [0], [0, 1]
    assert seeds == {
        "first stage": once,
        "UPR": once,
        "hard clues": once,
        "similarity": once,
        "LoRA": twice,
        "Q-PEFT-A": twice,
        "Q-PEFT-A, queries=2": twice,
        "LoRA + BM25": twice,
    }
    lora = found["LoRA", 1]
    assert lora["settings"]["config"]["seed"] == 1 and lora["settings"]["training"]["peft"]["r"] == 2
    assert lora["versions"]["torch"] and lora["training"]["steps"] == 2 and lora["ranking"]["pairs"] > 20
    assert (done / "out" / "tiny" / "LoRA" / "seed-1" / "adapter" / "lm_adapter").is_dir()
    assert found["LoRA", 0]["settings"]["training"]["examples"] != lora["settings"]["training"]["examples"]
    assert found["UPR", 0]["parameters"]["trainable"] == found["hard clues", 0]["parameters"]["trainable"] == 0
    weights = found["LoRA + BM25", 0]["fusion"]["weights"]
    assert len(weights) == 2 and sum(weights) == pytest.approx(1)
    assert [path.name for path in (done / "out").rglob("*.part*")] == []


def test_all_rank_the_same_candidates(done):
    ids = [{q: sorted(d for d, _ in ranking) for q, ranking in run.items()} for run in runs(done / "out").values()]
    assert len(ids) == 12 and all(other == ids[0] for other in ids) and set(ids[0]) <= {f"q{i}" for i in range(8)}


def test_figures_are_those_of_evaluate(done, job):
    """Read again from the run files: means, deviations over seeds, and what the CSV holds."""
    qrels = formats.beir.read_qrels(job / "data", "test")
    of_files = {}
    for name, run in runs(done / "out").items():
        of_files.setdefault(name.split("/")[1], []).append(evaluate(run, qrels, ["nDCG@10", "RR@10"]).means)
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO((done / "out/comparison.csv").read_text()))}
    folders = {
        "first stage": "first-stage",
        "Q-PEFT-A, queries=2": "Q-PEFT-A-queries=2",
        "LoRA + BM25": "LoRA-+-BM25",
        "hard clues": "hard-clues",
    }
    assert len(rows) == 8
    for name, row in rows.items():
        of_seeds = of_files[folders.get(name, name)]
        for measure in ("nDCG@10", "RR@10"):
            means = [means[measure] for means in of_seeds]
            assert float(row[measure]) == pytest.approx(statistics.fmean(means), abs=1e-9)
            deviation = row[f"{measure} deviation"]
            assert float(deviation) == pytest.approx(statistics.stdev(means)) if len(means) > 1 else deviation == ""
        assert row["nDCG@10 queries"] == "8"
    (table,) = json.loads((done / "out/comparison.json").read_text())
    assert {row["method"]: row["means"]["nDCG@10"] for row in table["rows"]} == pytest.approx(
        {name: float(row["nDCG@10"]) for name, row in rows.items()}
    )
    assert len(table["results"]) == 12 and all(result["commit"] for result in table["results"] if "settings" in result)
    assert not any("per_query" in result for result in table["results"])
    base = statistics.fmean(means["nDCG@10"] for means in of_files["UPR"])
    lora = statistics.fmean(means["nDCG@10"] for means in of_files["LoRA"])
    assert float(rows["LoRA"]["nDCG@10 difference to upr"]) == pytest.approx(lora - base)


def test_the_page(done):
    page = (done / "out" / "comparison.html").read_text()
    tags = Tags(page)
    assert not tags.open and "script" not in {tag for tag, _ in tags.seen}
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part[: part.index("</svg>") + 6])
    assert page.count("<svg") == 3  # means, costs, and the curve over training queries
    for text in (
        "documents per s",
        "queries per PetaFLOP",
        "trainable parameters",
        "training queries",
        "8 queries",
        "nDCG@10: mean of 8 queries",
        "Holm-corrected",
        "LoRA + BM25",
    ):
        assert text in page or text == "8 queries"
    text = (done / "out" / "comparison.md").read_text()
    assert "| 6. Q-PEFT-A |" in text and "### Cost" in text and "## Methods" in text
    assert "4 queries with 2 negatives, 2 a step, 1 epoch, learning rate " in text


def test_again_and_table_only(done, job, capsys):
    before = {path: path.stat().st_mtime_ns for path in (done / "out").rglob("*.json") if path.parent != done / "out"}
    assert compare(done / "plan.yaml", job, done / "out") == 0
    assert capsys.readouterr().out.count("there already") == 12
    page = (done / "out" / "comparison.html").read_text()
    assert compare(done / "plan.yaml", job / "nowhere", done / "out", "--table-only") == 0
    assert (done / "out" / "comparison.html").read_text() == page
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_costs_of_several_machines_are_told_apart(done, job, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    assert "several machines" not in (out / "comparison.md").read_text()
    file = out / "tiny" / "LoRA" / "seed-1" / "result.json"
    result = json.loads(file.read_text())
    result["machine"]["cuda"] = "NVIDIA Example, sm_90, 79 GiB"
    file.write_text(json.dumps(result))
    assert compare(done / "plan.yaml", job, out, "--table-only") == 0
    for page in ("comparison.md", "comparison.html"):
        text = (out / page).read_text()
        assert "of several machines" in text and "On NVIDIA Example: LoRA (seed 1)." in text


def test_two_processes_share_the_work(done, job, tmp_path):
    """Started at once, also when one of them is killed: each result is made once and is what one process makes."""
    out = tmp_path / "out"
    first, second, third = (Process(command(done / "plan.yaml", job, out)) for _ in range(3))
    third.wait_for(lambda: (out / "tiny" / "hard-clues").exists())
    third.popen.kill()
    third.end()
    texts = []
    for process in (first, second):
        code, text, error = process.end()
        assert code == 0, error
        texts.append(text)
    made = [line for text in texts for line in text.splitlines() if ", seed " in line and ": nDCG@10" in line]
    assert len(made) == len(set(made)) and 8 <= len(made) <= 12  # the one that was killed made the rest
    assert all(text.count("there already") >= 1 for text in texts)
    assert_same_runs(runs(out), runs(done / "out"))
    rows = [
        {row["method"]: row["means"] for row in json.loads((folder / "comparison.json").read_text())[0]["rows"]}
        for folder in (out, done / "out")
    ]
    assert rows[0] == {method: pytest.approx(means, abs=1e-4) for method, means in rows[1].items()}


def test_killed(done, job, tmp_path, capsys):
    """SIGKILL while the second seed of LoRA is at work: what is whole stays, the rest comes out as it would have."""
    out = tmp_path / "out"
    some = ("--method", "UPR", "--method", "LoRA + BM25")  # and LoRA, which the latter takes
    process = Process(command(done / "plan.yaml", job, out, *some))
    process.wait_for(lambda: (out / "tiny" / "LoRA" / "seed-1" / "settings.json").exists())
    process.popen.kill()
    assert process.end()[0] == -signal.SIGKILL
    there = results(out)
    assert ("LoRA", 0) in there and ("LoRA + BM25", 1) not in there and not (out / "comparison.md").exists()
    assert compare(done / "plan.yaml", job, out, *some) == 0
    assert capsys.readouterr().out.count("there already") == len(there)
    expected = runs(done / "out")
    assert len(found := runs(out)) == 6
    assert_same_runs(found, {name: expected[name] for name in found})


def test_a_trained_adapter_survives_a_kill_in_ranking(done, job, tmp_path, monkeypatch):
    """As a kill leaves it: the adapter is whole, the run has some queries."""
    monkeypatch.setattr("qpeft_ext.ranking.run.PAIRS_PER_BLOCK", 1)  # each query is written by itself
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    cell = out / "tiny" / "Q-PEFT-A" / "seed-0"
    trained = (cell / "trained.json").read_text()
    about = json.loads((cell / "run.trec.gz.json").read_text())
    lines = formats.read_run(cell / "run.trec.gz")
    (cell / "result.json").unlink()
    (cell / "run.trec.gz").unlink()
    (cell / "run.trec.gz.json").rename(cell / "run.trec.gz.part.json")
    formats.write_run(cell / "run.trec.gz.part", {q: lines[q] for q in list(lines)[:3]}, "Q-PEFT-A")
    assert about["settings"] == json.loads((cell / "settings.json").read_text())
    assert compare(done / "plan.yaml", job, out) == 0
    result = results(out)["Q-PEFT-A", 0]
    assert result["ranking"]["resumed_queries"] == 3 and (cell / "trained.json").read_text() == trained
    assert_same_runs(runs(out), runs(done / "out"))


def test_an_adapter_that_is_trained_again_counts_when_it_is_whole(done, job, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    cell = out / "tiny" / "Q-PEFT-A" / "seed-0"
    (cell / "result.json").unlink()
    shutil.rmtree(cell / "adapter")

    def cut_short(self, folder, *args, **options):
        folder.mkdir()
        raise ValueError("no space left")

    monkeypatch.setattr("qpeft_ext.model.QPeftModel.save_pretrained", cut_short)
    assert compare(done / "plan.yaml", job, out) != 0
    assert (cell / "adapter").is_dir() and not (cell / "trained.json").exists()
    monkeypatch.undo()
    assert compare(done / "plan.yaml", job, out) == 0
    assert_same_runs(runs(out), runs(done / "out"))


def test_changed_settings_redo_what_they_concern(done, job, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)

    def made_anew(*options, **changes) -> dict[str, str]:
        plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **changes)
        capsys.readouterr()
        assert compare(plan, job, out, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line.split(":")[0]: line.split("since ")[1] for line in lines if "made anew, since" in line}

    assert made_anew(**{"learning_rate: 1e-2, peft": "learning_rate: 1e-3, peft"}) == {
        f"tiny, {name}, seed {seed}": f"{place}training.learning_rate changed"
        for name, place in (("LoRA", ""), ("LoRA + BM25", "of."))
        for seed in (0, 1)
    }
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("trained.json")}
    fewer = {"learning_rate: 1e-2, peft": "learning_rate: 1e-3, peft", "candidates: 6": "candidates: 5"}
    some = ("--method", "UPR", "--method", "Q-PEFT-A")
    changed = made_anew(*some, **fewer)
    assert len(changed) == 6 and changed["tiny, Q-PEFT-A, seed 0"] == "test changed"
    assert trained == {path: path.stat().st_mtime_ns for path in out.rglob("trained.json")}  # nothing trained again
    assert made_anew(*some, **fewer, **{"CandidateRecall@2]": "CandidateRecall@3]"}) == {}  # from the run files
    assert "CandidateRecall@3" in results(out)["Q-PEFT-A", 0]["per_query"]


def test_copied_data_is_the_same_data_and_a_changed_document_is_not(done, job, tmp_path, capsys):
    out, copy = tmp_path / "out", tmp_path / "copy"
    shutil.copytree(done / "out", out)
    shutil.copytree(job, copy)
    corpus = next(copy.rglob("corpus.jsonl"))
    documents = [json.loads(line) for line in corpus.read_text().splitlines()]

    def made_anew() -> int:
        capsys.readouterr()
        assert compare(done / "plan.yaml", copy, out, "--method", "UPR") == 0
        return sum("made anew, since test changed" in line for line in capsys.readouterr().out.splitlines())

    os.utime(corpus, (1, 1))
    assert made_anew() == 0
    corpus.write_text("".join(json.dumps(d | {"text": d["text"].upper()}) + "\n" for d in documents))
    assert made_anew() == 2  # the first stage and UPR; BM25 does not mind capitals


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


def test_prefixes_from_an_index(done, job, tmp_path, monkeypatch, capsys):
    """Of every method whose LM is the plan's, in training and in ranking: the same results, and no times."""
    methods = [
        *METHODS,
        "soft prompt: {method: soft_prompt, learning_rate: 1e-2}",
        "full: {method: full, learning_rate: 1e-3}",
        "clues first: {method: q_peft_r, learning_rate: 1e-2, options: {layout: clues_first}}",
    ]
    of_tiny = {"    data: data\n    split: test\n": "    data: data\n    split: test\n    index: index\n"}
    plan, out = write_plan(tmp_path / "plan.yaml", job, methods, **of_tiny), tmp_path / "out"
    assert compare(plan, job, out) == 2 and "index is no index: it has no manifest.json" in capsys.readouterr().err
    index = [
        "index",
        str(job / "data"),
        "--out",
        str(job / "index"),
        "--base-model",
        str(job / "lm"),
        "--dtype",
        "float32",
        "--device",
        "cpu",
    ]
    assert main([*index, "--max-document-tokens", "39"]) == 0
    assert compare(plan, job, out) == 2 and "made with max_document_tokens 39, here it is 40" in capsys.readouterr().err
    shutil.rmtree(job / "index")
    assert main([*index, "--max-document-tokens", "40"]) == 0
    assert compare(plan, job, out) == 0
    found, expected = results(out), runs(done / "out")
    trained = {name for name in expected if "Q-PEFT-A" in name}  # Adam makes rounding larger: 2e-3
    ours = {name: run for name, run in runs(out).items() if name in expected}
    for names, most in ((trained, 2e-2), (expected.keys() - trained, 1e-4)):
        assert_same_runs(*({name: some[name] for name in names} for some in (ours, expected)), most)
    read = {
        key[0]: [result.get(part, {}).get("prefixes_from_index", 0) > 0 for part in ("training", "ranking")]
        for key, result in found.items()
    }
    assert read == {
        "UPR": [False, True],
        "hard clues": [False, True],
        "Q-PEFT-A": [True, True],
        "Q-PEFT-A, queries=2": [True, True],
    } | dict.fromkeys(
        ("first stage", "similarity", "LoRA", "LoRA + BM25", "soft prompt", "full", "clues first"), [False, False]
    )
    (table,) = json.loads((out / "comparison.json").read_text())
    cost = {row["method"]: row["cost"] for row in table["rows"]}
    assert cost["Q-PEFT-A"]["training_seconds"] is None is cost["UPR"]["documents_per_second"]
    assert cost["LoRA"]["training_seconds"] and cost["Q-PEFT-A"]["ranking_megabytes"] is not None
    assert (
        "no times are given: UPR (seed 0); hard clues (seed 0); Q-PEFT-A (seed 0, 1); Q-PEFT-A, queries=2 (seed 0, 1)."
    ) in (out / "comparison.md").read_text()


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
    assert captured.err.count("\n") == 1 and "1 results could not be made; the first: tiny, odd LoRA" in captured.err
    assert "nowhere" in captured.err and "UPR" in (tmp_path / "out" / "comparison.md").read_text()
    assert compare(plan, job, tmp_path / "out", "--method", "UPR") == 0
    dev = formats.read_run(tmp_path / "out" / "tiny" / "sim-+-BM25" / "seed-0" / "dev.trec.gz")
    assert all(0 < score <= 10 for ranking in dev.values() for _, score in ranking)  # cosines, not likelihoods


def test_results_without_runs_count_but_cannot_be_fused(done, job, tmp_path, capsys):
    """As `benchmarks/quality/results.py` unpacks them."""
    output = tmp_path / "out"
    for path in (done / "out").glob("*/*/*/*.json"):
        if path.name in ("settings.json", "result.json") and "BM25" not in str(path):
            place = output / path.relative_to(done / "out")
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    capsys.readouterr()
    assert compare(done / "plan.yaml", job, output) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "there are values but no run; remove" in captured.err
    assert captured.out.count("there already") == 10 and runs(output) == {}
    assert len((output / "comparison.md").read_text()) > 100


def test_nothing_is_trained_on_test_or_dev_queries(done, job):
    from qpeft_ext.compare.run import Comparison

    assert list(read_plan(done / "plan.yaml", collections=["tiny"]).collections) == ["tiny"]
    plan = read_plan(
        write_plan(
            done / "one_split.yaml",
            job,
            METHODS,
            **{
                "split: test\n    candidates": "split: train\n    queries: 3\n    candidates",
                "split: dev": "split: train, queries: 4",
            },
        )
    )
    data = Comparison(plan, job, done / "out", "cpu").data("tiny")
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
            done / "capped.yaml",
            job,
            METHODS,
            **{
                "split: test\n    candidates": "split: train\n    queries: 3\n    candidates",
                "train: {data: data, split: train}": "train: {data: data, split: train, queries: 5}",
                "split: dev": "split: train, queries: 4",
            },
        )
    )
    assert (
        Comparison(capped, job, done / "out", "cpu").data("tiny").examples("train", training.__class__(6, 2, 8, 2), 0)
        == more
    )


# -- tables, by hand -------------------------------------------------------------------------------------------------


def test_holm_and_deviations_by_hand(job, tmp_path):
    """Three methods against UPR on four queries; p-values from scipy's ttest_rel, corrected by hand."""
    from scipy.stats import ttest_rel

    methods = [
        "UPR: {method: upr}",
        "A: {method: q_peft_a, learning_rate: 1}",
        "R: {method: q_peft_r, learning_rate: 1}",
    ]
    plan = read_plan(
        write_plan(
            tmp_path / "plan.yaml",
            job,
            methods,
            **{"measures: [nDCG@10, RR@10, CandidateRecall@2]": "measures: [RR@10]"},
        )
    )
    values = {
        ("first stage", 0): [0.1, 0.2, 0.3, 0.4], ("UPR", 0): [0.2, 0.5, 0.4, 0.5],
        ("A", 0): [0.5, 0.6, 0.8, 0.9], ("A", 1): [0.7, 0.8, 0.8, 0.7],
        ("R", 0): [0.2, 0.4, 0.5, 0.5], ("R", 1): [0.2, 0.4, 0.5, 0.7],
    }  # fmt: skip
    for (name, seed), row in values.items():
        folder = tmp_path / "out" / "tiny" / name.replace(" ", "-") / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(
            json.dumps({"method": name, "seed": seed, "per_query": {"RR@10": dict(zip("abcd", row, strict=True))}})
        )
    (table,) = build_tables(plan, tmp_path / "out")
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["first stage", "UPR", "A", "R"]
    a, r = [0.6, 0.7, 0.8, 0.8], [0.2, 0.4, 0.5, 0.6]
    assert rows["A"].means["RR@10"] == pytest.approx(0.725)
    assert rows["A"].deviations["RR@10"] == pytest.approx(0.05 / 2**0.5)  # of 0.7 and 0.75
    assert rows["UPR"].deviations == {} and rows["A"].against["upr"].difference["RR@10"] == pytest.approx(0.325)
    upr, first = values["UPR", 0], values["first stage", 0]
    p_a, p_r = (ttest_rel(x, upr).pvalue for x in (a, r))
    assert p_a < p_r
    assert rows["A"].against["upr"].p_holm["RR@10"] == pytest.approx(2 * p_a)
    assert rows["R"].against["upr"].p_holm["RR@10"] == pytest.approx(max(2 * p_a, p_r))
    three = sorted((ttest_rel(x, first).pvalue, name) for x, name in ((a, "A"), (r, "R"), (upr, "UPR")))
    largest = 0.0
    for factor, (p, name) in zip((3, 2, 1), three, strict=True):
        largest = max(largest, min(1.0, factor * p))
        assert rows[name].against["first_stage"].p_holm["RR@10"] == pytest.approx(largest)
    assert "first_stage" not in rows["first stage"].against and "upr" not in rows["first stage"].against
    assert rows["R"].against["upr"].gain["RR@10"] == 2 and rows["R"].against["upr"].lose["RR@10"] == 1
    text = markdown(plan, [table])
    assert "| 4. R | +0.1750 (p=" in text and ", 2:1) |" in text
    assert "| 3. A | **0.7250 ± 0.0354**†‡ |" in text, text
    assert csv_text([table]).splitlines()[3].startswith("tiny,A,2,0.725,0.0353")
    table.results[-1]["training"] = {"queries": 3}  # of the 4 that the plan asks for
    assert "R: trained on 3 queries, all that the collection gives." in quality_notes(table)
    assert not any(note.startswith("A: trained on") for note in quality_notes(table))


def test_candidate_recall_by_hand():
    """Relevant documents among the first k ÷ those among the candidates; queries without any do not count."""
    qrels = {"a": {"x": 1, "y": 2, "z": 0, "elsewhere": 1}, "b": {"x": 1}, "c": {"w": 1}}
    run = {"a": [("n", 3.0), ("x", 2.0), ("y", 1.0), ("z", 0.0)], "b": [("x", 1.0)], "c": [("n", 1.0)]}
    values = per_query(run, qrels, ["CandidateRecall@2", "R@2"])
    assert list(values) == ["CandidateRecall@2", "R@2"]
    assert values["CandidateRecall@2"] == {"a": 0.5, "b": 1.0}
    assert values["R@2"] == pytest.approx({"a": 1 / 3, "b": 1.0, "c": 0.0})


# -- bad plans -------------------------------------------------------------------------------------------------------

BAD = [
    ("lm: {lm}", "", "the key 'lm' is missing"),
    ("seeds:", "seed:", "seed: unknown key; did you mean 'seeds'?"),
    ("seeds: [0, 1]", "seeds: [0, x]", "seeds: expected a list of whole numbers, got [0, 'x']"),
    ("seeds: [0, 1]", "seeds: [0, 0]", "seeds: each can be given once only"),
    ("measures: [nDCG@10", "measures: [nDCGG@10", "measures: unknown measure 'nDCGG@10'"),
    ("candidates: 6", "candidates: 0", "collections.tiny.candidates: must be above 0, got 0"),
    ("candidates: 6", "candidates: six", "collections.tiny.candidates: expected a whole number, got 'six'"),
    ("    dev: {{data: data, split: dev}}\n", "", "collections.tiny: the key 'dev' is missing"),
    ("train: {{data: data, split: train}}", "train: {{split: train}}", "collections.tiny.train: expected either data"),
    ("queries: 4,", "queriess: 4,", "training.queriess: unknown key; did you mean 'queries'?"),
    ("rank: 4,", "rnk: 4,", "methods.UPR: QPeftConfig: unknown option 'rnk'; did you mean 'rank'?"),
    ("rank: 4,", "seed: 4,", "options.seed: is set by seeds"),
    ("method: upr", "method: uprr", "methods.UPR.method: unknown method 'uprr'; did you mean 'upr'?"),
    ("method: lora, learning_rate: 1e-2,", "method: lora,", "methods.LoRA: the key 'learning_rate' is missing"),
    ("peft: {{r: 2}}", "peft: {{rr: 2}}", "methods.LoRA: LoraConfig: unknown option 'rr'; did you mean 'r'?"),
    ("of: LoRA", "of: LORA", "LoRA + BM25.of: expected another method of the plan that is no fusion, got 'LORA'"),
    ("options: {{k: 3}}", "options: {{max_query_tokens: 3}}", "methods.hard clues.options.max_query_tokens: is set by"),
    ("[2]}}", "2}}", "methods.Q-PEFT-A.vary.training.queries: expected a list of values, got 2"),
    ("[2]}}", "[2, two]}}", "methods.Q-PEFT-A.vary.training.queries: expected a whole number, got 'two'"),
    ("similarity: {{", "U P R: {{method: upr}}\n  U-P-R: {{", "would share a folder; rename one of them"),
    ("lm: {lm}", "lm: {lm}\nlm: {lm}", "line 3: not valid YAML (the key 'lm' is given twice)"),
    ("seeds: [0, 1]", "seeds: [0, 1", "not valid YAML ("),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), BAD)
def test_bad_plans(job, tmp_path, capsys, old, new, message):
    old, new = (text.format(lm=job / "lm") for text in (old, new))
    plan = write_plan(tmp_path / "plan.yaml", job, METHODS, **{old: new})
    assert compare(plan, job, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"qpeft compare: error: {plan}") and err.count("\n") == 1
    assert message in err, err
    assert not (tmp_path / "out").exists()


def test_other_bad_input(done, job, tmp_path, capsys):
    for arguments, message in (
        (["nowhere.yaml"], "No such file"),
        ([str(done / "plan.yaml"), "--method", "LORA"], "there is no method 'LORA'; did you mean 'LoRA'?"),
        ([str(done / "plan.yaml"), "--collection", "tinny"], "there is no collection 'tinny'; did you mean 'tiny'?"),
        ([str(done / "plan.yaml"), "--table-only"], "there is no result of this plan yet"),
        ([str(done / "plan.yaml"), "--data-root", "nowhere"], "data: no such file or folder"),
    ):
        assert main(["compare", *arguments, "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_labels_cover_neither_each_other_nor_points():
    from qpeft_ext.compare.label_places import _POINT, _around, _shared, label_places

    rng = np.random.default_rng(0)
    crowd = np.concatenate([rng.normal((100, 100), 8, (12, 2)), rng.uniform(20, 180, (8, 2))])
    sizes, within = [(12.0, 9.0)] * len(crowd), (0.0, 0.0, 200.0, 200.0)
    labels = [_around(place, 12, 9) for place in label_places(crowd, sizes, within)]
    for i, label in enumerate(labels):
        assert label[0] >= 0 and label[1] >= 0 and label[2] <= 200 and label[3] <= 200
        assert all(_shared(label, other) == 0 for other in labels[i + 1 :])
        assert all(_shared(label, _around(point, 2 * _POINT, 2 * _POINT)) == 0 for point in crowd)
