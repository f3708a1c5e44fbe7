"""`qpeft compare`: one comparison of all kinds of methods, its files, and what later runs make of them."""

import csv
import io
import json
import os
import shutil
import signal
import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from evaluation.test_report import Tags
from jobs.compare_job import METHODS, assert_same_runs, command, compare, results, runs, write_plan
from jobs.processes import forked_command

from qpeft_ext import QPeftModel, formats
from qpeft_ext.cli import main
from qpeft_ext.evaluation.measures import evaluate

pytest.importorskip("peft")
pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """Plan and results of the whole comparison, which nothing happened to."""
    folder = tmp_path_factory.mktemp("done")
    plan = write_plan(folder / "plan.yaml", job, METHODS)
    assert compare(plan, job, folder / "out") == 0
    return folder


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
    first, second, third = (forked_command(command(done / "plan.yaml", job, out)) for _ in range(3))
    third.wait_for(lambda: (out / "tiny" / "hard-clues").exists())
    third.kill()
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
    process = forked_command(command(done / "plan.yaml", job, out, *some))
    process.wait_for(lambda: (out / "tiny" / "LoRA" / "seed-1" / "settings.json").exists())
    process.kill()
    assert process.end()[0] == -signal.SIGKILL
    there = results(out)
    assert ("LoRA", 0) in there and ("LoRA + BM25", 1) not in there and not (out / "comparison.md").exists()
    assert compare(done / "plan.yaml", job, out, *some) == 0
    assert capsys.readouterr().out.count("there already") == len(there)
    expected = runs(done / "out")
    assert len(found := runs(out)) == 6
    assert_same_runs(found, {name: expected[name] for name in found})


def test_a_trained_adapter_survives_a_kill_in_ranking(done, job, tmp_path, monkeypatch):
    """A kill leaves a whole adapter and a run with some of the queries."""
    monkeypatch.setattr("qpeft_ext.ranking.run.PAIRS_PER_BLOCK", 1)  # each query is written by itself
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    cell = out / "tiny" / "Q-PEFT-A" / "seed-0"
    trained = (cell / "trained.json").read_text()
    about = json.loads((cell / "run.trec.gz.json").read_text())
    lines = formats.read_run(cell / "run.trec.gz")
    (cell / "result.json").unlink()
    (cell / "run.trec.gz").unlink()
    formats.write_run(cell / "run.trec.gz.part", {q: lines[q] for q in list(lines)[:3]}, "Q-PEFT-A")
    (cell / "run.trec.gz.json").rename(cell / "run.trec.gz.part.json")  # a writer removes settings of another file
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

    save = QPeftModel.save_pretrained

    def cut_short(self, folder, *args, **options):
        if Path(folder).name != "adapter":  # a checkpoint
            return save(self, folder, *args, **options)
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


def test_prefixes_from_an_index(done, job, tmp_path, monkeypatch, capsys):
    """Every method whose LM is the plan's trains and ranks with the index: the same results, and no times."""
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


def test_results_without_runs_count_but_cannot_be_fused(done, job, tmp_path, capsys):
    """Results that `benchmarks/quality/results.py` has unpacked are read."""
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
