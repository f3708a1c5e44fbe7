"""Tables of `qpeft compare` when the plan has changed since results were made."""

import json
import shutil

import pytest
from jobs.compare_job import METHODS, compare, write_plan

pytest.importorskip("peft")
pytest.importorskip("bm25s")
pytest.importorskip("ir_measures")

SOME = [method for method in METHODS if "LoRA" in method or method.startswith("UPR:")]


@pytest.fixture(scope="module")
def done(job, tmp_path_factory):
    """Results of the first stage, UPR, a LoRA and its fusion."""
    folder = tmp_path_factory.mktemp("done")
    assert compare(write_plan(folder / "plan.yaml", job, SOME), job, folder / "out") == 0
    return folder


@pytest.mark.parametrize(("old", "new", "names"), [
    ("learning_rate: 1e-2, peft", "learning_rate: 1e-3, peft", "training.learning_rate"),
    ("peft: {{r: 2}}", "peft: {{lora_alpha: 2}}", "training.peft"),
    ("lora, learning_rate: 1e-2", "lora, passages: max, learning_rate: 1e-2", "passages"),
    ("lora, learning_rate: 1e-2", "lora, options: {{margin: 0.5}}, learning_rate: 1e-2", "config.margin"),
])  # fmt: skip
def test_tables_leave_out_what_was_made_for_an_earlier_plan(done, job, tmp_path, capsys, old, new, names):
    """They would show it under what the plan says now, as if it had been made with that."""
    out = tmp_path / "out"
    shutil.copytree(done / "out", out)
    before = {row["method"]: row["means"] for row in json.loads((out / "comparison.json").read_text())[0]["rows"]}
    plan = write_plan(tmp_path / "plan.yaml", job, SOME, **{old.format(): new.format()})
    capsys.readouterr()
    assert compare(plan, job / "nowhere", out, "--table-only") == 0
    said = capsys.readouterr().out
    for seed in (0, 1):
        for name, place in (("LoRA", ""), ("LoRA + BM25", "of.")):
            assert f"tiny, {name}, seed {seed}: left out of the tables, since {place}{names} changed; run" in said
    (tables,) = json.loads((out / "comparison.json").read_text())
    del before["LoRA"], before["LoRA + BM25"]
    assert {row["method"]: row["means"] for row in tables["rows"]} == before
