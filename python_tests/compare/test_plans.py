"""Plans of `qpeft compare` with mistakes: one line that names the file and the key."""

import pytest
from jobs.compare_job import METHODS, compare, write_plan

from qpeft_ext.cli import main

pytest.importorskip("peft")
pytest.importorskip("ir_measures")

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
    ("method: upr", "method: upr, passages: sum", "methods.UPR: passages must be max, mean or first, got 'sum'"),
    ("method: upr", "method: upr, passages: max, passage_tokens: 41", "passage_tokens must be at most max_document"),
    ("of: LoRA", "of: LoRA, passages: max", "methods.LoRA + BM25.passages: fusion reads no documents"),
    ("similarity: {{", "U P R: {{method: upr}}\n  U-P-R: {{", "would share a folder; rename one of them"),
    ("similarity: {{", "first-stage: {{method: upr}}\n  similarity: {{", "or the folder, of the first stage's own row"),
    ("collections:\n", "collections:\n  ti/ny: {{data: data}}\n  ti ny: {{data: data}}\n", "would share a folder;"),
    ("collections:\n", "collections:\n  prefixes: {{data: data}}\n", "collections.prefixes: is a name that the folder"),
    ("collections:\n", "collections:\n  comparison.md: {{data: data}}\n", "is a name that the folder of results needs"),
    ("similarity: {{", '"two\\nlines": {{method: upr}}\n  similarity: {{', "methods: expected a name on one line, got"),
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


def test_other_bad_input(job, tmp_path, capsys):
    plan = str(write_plan(tmp_path / "plan.yaml", job, METHODS))
    for arguments, message in (
        (["nowhere.yaml"], "No such file"),
        ([plan, "--method", "LORA"], "there is no method 'LORA'; did you mean 'LoRA'?"),
        ([plan, "--collection", "tinny"], "there is no collection 'tinny'; did you mean 'tiny'?"),
        ([plan, "--table-only"], "there is no result of this plan yet"),
        ([plan, "--data-root", "nowhere"], "data: no such file or folder"),
    ):
        assert main(["compare", *arguments, "--output", str(tmp_path / "out")]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
