"""`qpeft distill`: a reranker's scores become a document-first adapter."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from cli.in_process import run_command
from families.tiny import tiny_lm
from jobs.tiny_job import save_adapter, save_lm
from prompts.reranker_tokenizers import qwen_tokenizer
from small_data import write_lines

import qpeft_ext as qpeft
from qpeft_ext import formats
from qpeft_ext.cli import main
from qpeft_ext.cli.distill import DistillOptions, _teacher
from qpeft_ext.ranking import teacher

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

WORDS = ("tides", "boats", "lamps", "ropes", "sails", "storms")
EXAMPLES = [
    {"query_id": f"q{i}", "query": word, "positives": [{"id": word, "text": f"{word} by the sea"}],
     "negatives": ["a note", f"the end of {word[1:]}"]}
    for i, word in enumerate(WORDS)
]  # fmt: skip


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """``examples.jsonl``, a reranker by its name, the same LM by another, an LM of letters and an adapter of it."""
    folder = tmp_path_factory.mktemp("job")
    write_lines(folder / "examples.jsonl", map(json.dumps, EXAMPLES))
    tokenizer = qwen_tokenizer()
    for name in ("Qwen3-Reranker-0.6B", "my-lm"):
        tiny_lm("qwen3", vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    save_adapter(folder / "adapter", save_lm(folder / "letters"))
    shutil.copytree(folder / "adapter", folder / "moved")  # to where its LM has another name
    config = json.loads((folder / "moved" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/nowhere/letters"
    (folder / "moved" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def command(job, output, *options, teacher="Qwen3-Reranker-0.6B", base_model="my-lm") -> list[str]:
    where = ("distill", "--teacher", job / teacher, "--base-model", job / base_model, "--output", output)
    given = ("--train", job / "examples.jsonl", "--device", "cpu", "--max-steps", 2, "--rank", 8)
    return [str(x) for x in (*where, *given, "--generated-lora-rank", 2, *options)]


def scores_of(reranker, examples) -> list[float]:
    pairs = [(e["query"], document) for e in examples for document in (*e["positives"], *e["negatives"])]
    return reranker.predict(pairs).tolist()


def written_scores(path) -> list[float]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [score for row in rows for score in (*row["positive_scores"], *row["negative_scores"])]


def test_query_first_becomes_document_first(job, tmp_path, capsys):
    out = run_command(capsys, *command(job, tmp_path / "student", "--layout", "document_first"))
    assert "wrote the teacher's scores of 6 examples" in out and "enough of its own" not in out
    path = tmp_path / "student" / "teacher_scores.jsonl"
    reranker = qpeft.Reranker.from_lm(job / "Qwen3-Reranker-0.6B", device="cpu")
    assert written_scores(path) == pytest.approx(scores_of(reranker, EXAMPLES), abs=1e-5)
    read = formats.read_examples(path)
    assert [{k: row[k] for k in EXAMPLES[0]} for row in read] == EXAMPLES
    student = qpeft.Reranker.from_pretrained(tmp_path / "student")
    config = student.model.qpeft_config
    assert (config.layout, config.template, config.clues) == ("document_first", "qpeft", "top_k")
    assert (config.loss, config.in_batch_negatives, config.score) == ("margin_mse", False, "yes_no")
    assert (config.yes_words, config.no_words, config.exact_words) == (("yes",), ("no",), True)
    assert not student.model.why_no_index
    assert np.isfinite(student.predict([(e["query"], "the sea") for e in EXAMPLES])).all()


def test_the_student_learns_the_teachers_margins(job, tmp_path, capsys):
    """A LoRA is trained for some steps. Its margins then follow those of the teacher, which differ from the labels."""
    options = ("--clues", "none", "--generated-lora-rank", 0, "--lora-rank", 4, "--queries-per-group", 6,
               "--lora-option", "target_modules=all-linear", "--max-steps", 25, "--learning-rate", 0.02)  # fmt: skip
    run_command(capsys, *command(job, tmp_path / "student", *options))
    config = qpeft.QPeftConfig.from_pretrained(tmp_path / "student")
    student = scores_of(qpeft.Reranker.from_pretrained(tmp_path / "student"), EXAMPLES)
    before = scores_of(qpeft.Reranker.from_lm(
        job / "my-lm", "qpeft", config={"score": "yes_no", "exact_words": True}), EXAMPLES)  # fmt: skip
    taught = written_scores(tmp_path / "student" / "teacher_scores.jsonl")

    def error(scores) -> float:
        rows = np.array(scores).reshape(-1, 3)
        margins, wanted = ((r[:, :1] - r[:, 1:]) for r in (rows / config.temperature, np.array(taught).reshape(-1, 3)))
        return float(((margins - wanted) ** 2).mean())

    assert error(student) < 0.2 * error(before)


@pytest.mark.parametrize(("options", "score"), [
    (("--score", "likelihood"), "likelihood"),
    (("--loss", "kl_divergence", "--score", "graded", "--option", "max_grade=2"), "graded"),
], ids=["likelihood", "graded"])  # fmt: skip
def test_another_score_and_an_adapter_as_teacher(job, tmp_path, capsys, options, score):
    dev = ("--dev", job / "examples.jsonl", "--teacher-scores", tmp_path / "scores.jsonl")
    run_command(capsys, *command(job, tmp_path / "student", *options, *dev, teacher="adapter", base_model="letters"))
    assert qpeft.QPeftConfig.from_pretrained(tmp_path / "student").score == score
    expected = scores_of(qpeft.Reranker.from_pretrained(job / "adapter"), EXAMPLES)
    for name in ("scores.jsonl", "dev_scores.jsonl"):
        assert written_scores(tmp_path / name) == pytest.approx(expected, abs=1e-4)


def test_a_teacher_whose_lm_has_another_name(job, tmp_path, capsys):
    lm = ("--teacher-base-model", job / "letters")
    run_command(capsys, *command(job, tmp_path / "student", *lm, teacher="moved", base_model="letters"))
    expected = scores_of(qpeft.Reranker.from_pretrained(job / "adapter"), EXAMPLES)
    assert written_scores(tmp_path / "student" / "teacher_scores.jsonl") == pytest.approx(expected, abs=1e-4)


def test_the_revision_of_a_teacher_is_that_of_its_lm(job, tmp_path):
    where = {"teacher_revision": "v2", "base_model": "my-lm", "output": tmp_path, "train": tmp_path}
    adapter = DistillOptions(teacher=str(job / "adapter"), **where)
    assert _teacher(adapter).lm_revision == "v2"
    reranker = DistillOptions(teacher=str(job / "Qwen3-Reranker-0.6B"), **where)
    assert _teacher(reranker).lm_revision == "v2"


def test_a_revision_that_an_lm_lacks_is_an_error_of_an_lm(job, tmp_path, monkeypatch):
    """The cache of the Hub has the LM in one commit, and there is no connection."""
    commit, stored = "0" * 40, tmp_path / "models--org--lm"
    shutil.copytree(job / "Qwen3-Reranker-0.6B", stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    given = {"teacher": "org/lm", "teacher_template": "qwen3_reranker", "base_model": "my-lm", "output": tmp_path}
    assert _teacher(DistillOptions(**given, train=tmp_path)).base_model == "org/lm"
    with pytest.raises(OSError, match="--teacher: cannot load the base LM 'org/lm'"):
        _teacher(DistillOptions(**given, train=tmp_path, teacher_revision="v2"))


def test_interrupted(job, tmp_path, capsys, monkeypatch):
    """The same command goes on where the teacher stopped, and ends with the same files."""
    monkeypatch.setattr(teacher, "_BLOCK", 2)
    run_command(capsys, *command(job, tmp_path / "whole"))
    score, scored = teacher.with_teacher_scores, []

    def interrupted(reranker, examples):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.extend(score(reranker, examples))
        return scored[-len(examples) :]

    monkeypatch.setattr(teacher, "with_teacher_scores", interrupted)
    output, part = tmp_path / "student", tmp_path / "student" / "teacher_scores.jsonl.part"
    assert main(command(job, output)) == 130
    assert f"{part} keeps the teacher's scores of 2 of 6 examples: the same command" in capsys.readouterr().err
    assert main(command(job, output, "--max-document-tokens", 9)) == 2
    err = capsys.readouterr().err
    assert "max_document_tokens was 256, is 9" in err and "start over with --overwrite" in err and err.count("\n") == 1
    monkeypatch.setattr(teacher, "with_teacher_scores", score)
    out = run_command(capsys, *command(job, output))
    assert f"{part} keeps the teacher's scores of 2 of 6 examples: going on from there" in out
    for name in ("teacher_scores.jsonl", "teacher_scores.jsonl.json", "adapter_model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not part.exists()
    monkeypatch.setattr(teacher, "with_teacher_scores", lambda *_: pytest.fail("they are there"))
    out = run_command(capsys, *command(job, output, "--overwrite", "--learning-rate", 0.1))
    assert "the teacher's scores are there" in out


def test_scores_of_another_teacher_are_not_taken(job, tmp_path, capsys):
    scores = ("--teacher-scores", tmp_path / "scores.jsonl")
    run_command(capsys, *command(job, tmp_path / "one", *scores))
    before = (tmp_path / "scores.jsonl").read_bytes()
    instruction = (*scores, "--teacher-option", "instruction=Find boats.")
    assert main(command(job, tmp_path / "two", *instruction)) == 2
    err = capsys.readouterr().err
    assert "scores.jsonl was made with other settings: options was" in err and "--overwrite" in err
    assert (tmp_path / "scores.jsonl").read_bytes() == before
    run_command(capsys, *command(job, tmp_path / "two", *instruction, "--overwrite"))
    assert (tmp_path / "scores.jsonl").read_bytes() != before


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: lines[1:] + lines[:1]])
def test_scores_that_lost_an_example_are_not_taken(job, tmp_path, capsys, change):
    """An editor or a copy that stopped: fewer examples would be trained on, without a word."""
    file = tmp_path / "scores.jsonl"
    run_command(capsys, *command(job, tmp_path / "one", "--teacher-scores", file))
    before = file.read_bytes()
    file.write_bytes(b"".join(change(before.splitlines(keepends=True))))
    assert main(command(job, tmp_path / "two", "--teacher-scores", file)) == 2
    err = capsys.readouterr().err
    assert "scores.jsonl was changed since it was made: it has other examples; name another" in err
    run_command(capsys, *command(job, tmp_path / "two", "--teacher-scores", file, "--overwrite"))
    assert file.read_bytes() == before


@pytest.mark.parametrize(("given", "options", "message"), [
    ({"teacher": "my-lm"}, (), "--teacher: the LM"),
    ({"teacher": "my-lm"}, ("--teacher-template", "qwen3"), "template must be one of"),
    ({"teacher": "missing"}, (), "there is no adapter folder"),
    ({"teacher": "adapter"}, ("--teacher-template", "upr"), "--teacher-template is for a teacher without an"),
    ({"teacher": "adapter"}, ("--teacher-option", "seed=1"), "--teacher-option is for a teacher without an adapter"),
    ({}, ("--teacher-base-model", "letters"), "--teacher-base-model is for an adapter, and "),
    ({"teacher": "adapter"}, ("--teacher-base-model", " "), "--teacher-base-model is empty"),
    ({"teacher": "moved"}, (), "(QPeftModel), --teacher-base-model (command line)"),
    ({}, ("--loss", "listwise"), "--loss must be one of margin_mse, kl_divergence"),
    ({}, ("--train", "missing.jsonl"), "missing.jsonl"),
    ({"base_model": "letters"}, (), "yes_words: 'yes' must be a single token of the LM's tokenizer"),
    ({}, ("--option", "in_batch_negatives=true"), "which documents of other examples do not have"),
    ({}, ("--template", "qwen3_reranker"), "this template has clues='none'"),
    ({}, ("--max-query-tokens", 1), "has 6 tokens, max_query_tokens is 1"),
    ({}, ("--lora-option", "r=2"), "add --lora-rank 8"),
    ({}, ("--lora-rank", 2, "--lora-option", "rank=2"), "LoraConfig: unknown option 'rank'"),
    ({}, ("--lora-rank", 2, "--lora-option", "target_modules=nothing"), "cannot put an adapter (LoraConfig) into the"),
])  # fmt: skip
def test_bad_input_is_one_line(job, tmp_path, capsys, given, options, message):
    assert main(command(job, tmp_path / "student", *options, **given)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "student" / "adapter_config.json").exists()
