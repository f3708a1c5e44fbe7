"""`qpeft train`, from files to an adapter that reranks."""

import json
import re

import pytest
import torch
from jobs.tiny_job import make_job
from safetensors.torch import load_file
from small_data import QUERIES

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.utils.locks import locked_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"))


def train(job, output, *options) -> int:
    return main(
        [
            "train",
            "--base-model",
            str(job / "lm"),
            "--output",
            str(output),
            "--option",
            "num_heads=4",
            "--rank",
            "8",
            "--max-steps",
            "3",
            "--deterministic",
            "--device",
            "cpu",
            *map(str, options),
        ]
    )


@pytest.mark.parametrize("clues", ["attention", "top_k"])
def test_a_beir_folder_becomes_an_adapter(job, tmp_path, clues, capsys):
    assert train(job, tmp_path / "adapter", "--data", job / "data", "--clues", clues, "--cache-bytes", 1 << 20) == 0
    out = capsys.readouterr().out
    assert "3 training examples" in out and "parameters are trained" in out and "wrote the adapter to" in out
    assert "(its loss has the temperature 0." in out
    reranker = qpeft.Reranker.from_pretrained(tmp_path / "adapter")
    config = reranker.model.qpeft_config
    assert (config.clues, config.generated_lora_rank, config.target_modules) == (clues, 16, ("all-linear",))
    assert len(reranker.rank(QUERIES["q1"], ["the sea", "the moon"])) == 2


def test_queries_are_kept_back_to_calibrate_on(job, tmp_path, capsys):
    words = ["sea", "moon", "boat", "tide", "wind"]
    lines = [
        {"query": f"the {words[i % 5]} {i}", "positives": [f"{words[i % 5]} {i}"], "negatives": [f"{words[i % 4]} x"]}
        for i in range(48)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples = ("--train", tmp_path / "examples.jsonl", "--calibrate")
    assert train(job, tmp_path / "adapter", *examples, "--clues", "none", "--generated-lora-rank", 2) == 0
    out = capsys.readouterr().out
    assert "48 training examples" in out and "20 queries are kept back to calibrate on" in out
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["calibration"]
    if found is None:  # the scores of a random LM may rank no better than chance
        assert "the adapter is not calibrated: calibration: relevant documents do not have" in out
    else:
        assert (found["measured"]["queries"], found["measured"]["pairs"]) == (20, 40)
    (tmp_path / "examples.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert train(job, tmp_path / "other", *examples) == 2
    assert "--calibrate keeps 20 queries back, of 1 training example;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ((), 16),
        (("--generated-lora-rank", 0), None),
        (("--generated-lora-rank", 4), 4),
        (("--option", "generated_lora_rank=null"), None),
        (("--generated-lora-rank", 4, "--option", "generated_lora_rank=2"), 2),
        (("--loss", "pointwise"), None),
        (("--clues", "none", "--option", "num_virtual_tokens=2"), None),
        (("--clues", "none", "--generated-lora-rank", 4), 4),
        (("--option", "compat=official", "--option", "temperature=0.2"), None),
    ],
)
def test_clues_come_with_a_generated_lora(job, tmp_path, monkeypatch, given, rank):
    """Unless something is asked for that has none."""
    asked = config_of(monkeypatch, job, tmp_path, "--data", job / "data", *given)
    assert asked.generated_lora_rank == rank


@pytest.mark.parametrize(
    ("negatives", "given", "in_batch"),
    [
        (7, (), False),
        (6, (), True),
        (7, ("--num-negatives", 3), True),
        (7, ("--option", "in_batch_negatives=true"), True),
        (7, ("--loss", "contrastive"), True),
        (7, ("--option", "num_hard_negatives=2"), True),
    ],
)
def test_in_batch_negatives_only_where_there_are_few(job, tmp_path, monkeypatch, negatives, given, in_batch):
    examples = [
        {"query": "boats", "positives": ["a boat"], "negatives": [f"no {i}" for i in range(n)]} for n in (9, negatives)
    ]
    (tmp_path / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    asked = config_of(monkeypatch, job, tmp_path, "--train", tmp_path / "examples.jsonl", *given)
    assert asked.in_batch_negatives is in_batch


def config_of(monkeypatch, job, tmp_path, *options) -> qpeft.QPeftConfig:
    """What a training with these options would use."""
    from qpeft_ext import model

    class Asked(Exception):
        pass

    def stop(lm, config):
        raise Asked(config)

    monkeypatch.setattr(model, "get_qpeft_model", stop)
    with pytest.raises(Asked) as asked:
        qpeft.cli.app.app(
            [
                "train",
                "--base-model",
                str(job / "lm"),
                "--output",
                str(tmp_path / "adapter"),
                "--device",
                "cpu",
                *map(str, options),
            ],
            standalone_mode=False,
        )
    return asked.value.args[0]


def test_any_option_of_the_config(job, tmp_path, capsys):
    options = [
        "score_gate=true",
        "source=candidates",
        "filters=query_tokens,stop_words",
        "rank=null",
        "temperature=0.2",
        "generated_lora_rank=2",
        'target_modules=["o_proj"]',
    ]
    given = [word for option in options for word in ("--option", option)]
    pytest.importorskip("bm25s")
    assert train(job, tmp_path / "adapter", "--data", job / "data", "--clues", "top_k", *given) == 0
    config = qpeft.QPeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.score_gate, config.source, config.rank, config.temperature) == (True, "candidates", None, 0.2)
    assert config.filters == ("query_tokens", "stop_words") and config.target_modules == ("o_proj",)
    capsys.readouterr()
    for wrong, message in [
        ("score_gate", "--option must be NAME=VALUE, got 'score_gate'"),
        ("scoregate=true", "unknown option 'scoregate'; did you mean 'score_gate'"),
        ("score_gate=yes", "score_gate must be True or False, got 'yes'"),
    ]:
        assert train(job, tmp_path / "other", "--data", job / "data", "--clues", "top_k", "--option", wrong) == 2
        assert message in capsys.readouterr().err


def test_resumed_after_a_kill(job, tmp_path):
    """The second run starts from what a kill between the steps 2 and 3 would have left."""
    examples, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    lines = [
        json.dumps({"query": f"tide {i}", "positives": [f"moon {i}"], "negatives": ["boat", "wind"]}) for i in range(8)
    ]
    examples.write_text("\n".join(lines) + "\n")
    dev.write_text(lines[0] + "\n")
    options = ["--train", examples, "--dev", dev, "--save-steps", 1]
    assert train(job, tmp_path / "whole", *options) == 0
    assert train(job, tmp_path / "killed", *options) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "checkpoints/checkpoint-3/complete.json"):
        (tmp_path / "killed" / name).unlink()
    assert train(job, tmp_path / "killed", *options) == 2  # says: --resume or --overwrite
    assert train(job, tmp_path / "killed", *options, "--resume") == 0
    whole, killed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_what_is_refused(job, tmp_path, capsys):
    output, options = tmp_path / "adapter", ["--data", job / "data", "--save-steps", 2]
    assert train(job, output, *options, "--resume", "--overwrite") == 2
    assert "give one of them" in capsys.readouterr().err
    assert train(job, output, *options) == 0
    assert train(job, output, *options) == 2
    assert "already holds an adapter" in capsys.readouterr().err
    (output / "adapter_config.json").unlink()
    assert train(job, output, *options) == 2
    assert "holds checkpoints of an earlier run; --resume goes on" in capsys.readouterr().err
    assert train(job, output, *options, "--overwrite", "--learning-rate", 1e-4) == 0


def test_resume_without_a_checkpoint_does_not_replace_an_adapter(job, tmp_path, capsys):
    output, options = tmp_path / "adapter", ["--data", job / "data", "--max-steps", 1]
    assert train(job, output, *options, "--resume") == 0  # there is nothing to lose
    assert f"{output}/checkpoints has no complete checkpoint: training starts at the beginning" in "".join(
        capsys.readouterr().out.splitlines()
    )
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for cut in (False, True):
        if cut:  # by a kill in the middle of a save
            (output / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        assert train(job, output, *options, "--resume", "--learning-rate", 0.1) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "no complete checkpoint to resume from" in err and "--overwrite" in err
        assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert train(job, output, *options, "--overwrite", "--learning-rate", 0.1) == 0
    assert (output / "adapter_model.safetensors").read_bytes() != before[output / "adapter_model.safetensors"]


def arguments_of(monkeypatch, job, tmp_path, *options):
    """The `TrainingArguments` of a training with these options."""
    from qpeft_ext.training import fit as module

    class Asked(Exception):
        pass

    def stop(model, args, *_, **__):
        raise Asked(args)

    monkeypatch.setattr(module, "QPeftTrainer", stop)
    with pytest.raises(Asked) as caught:
        train(job, tmp_path / "adapter", "--data", job / "data", *options)
    return caught.value.args[0]


def test_the_schedule_is_that_of_training_arguments(job, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    names = (
        "weight_decay",
        "warmup_steps",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "max_grad_norm",
        "optim",
        "gradient_accumulation_steps",
    )
    plain = arguments_of(monkeypatch, job, tmp_path)
    assert [getattr(plain, name) for name in names] == [getattr(TrainingArguments("x"), name) for name in names]
    assert plain.per_device_train_batch_size == 4
    asked = arguments_of(
        monkeypatch,
        job,
        tmp_path,
        "--batch-size",
        8,
        "--gradient-accumulation",
        3,
        "--weight-decay",
        0.1,
        "--warm-up",
        0.25,
        "--scheduler",
        "cosine",
        "--max-grad-norm",
        0,
        "--queries-per-group",
        2,
    )
    assert asked.per_device_train_batch_size == 8 and asked.get_warmup_steps(10) == 3
    assert [getattr(asked, name) for name in names] == [0.1, 0.25, "cosine", None, 0.0, "adamw_torch_fused", 3]
    steps = arguments_of(monkeypatch, job, tmp_path, "--warm-up", 20, "--gradient-accumulation-steps", 2)
    assert steps.get_warmup_steps(1000) == 20 and steps.gradient_accumulation_steps == 2


def test_a_batch_of_two_groups_is_two_accumulated_batches(job, tmp_path):
    """And neither is a batch of one group."""
    words = ("tides", "boats", "lamps", "ropes", "sails", "storms", "gulls", "nets")
    lines = [
        json.dumps({"query": word, "positives": [f"{word} by the sea"], "negatives": ["a note"]}) for word in words
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    files = {}
    for name, options in (("batch", ["--batch-size", 4]), ("accumulated", ["--gradient-accumulation", 2]), ("one", [])):
        assert (
            train(
                job,
                tmp_path / name,
                "--train",
                tmp_path / "train.jsonl",
                "--clues",
                "attention",
                "--scheduler",
                "constant",
                "--queries-per-group",
                2,
                *options,
                "--max-steps",
                2,
            )
            == 0
        )
        files[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for name, weight in files["batch"].items():
        torch.testing.assert_close(files["accumulated"][name], weight, rtol=0, atol=1e-4)  # Adam: see test_two_ranks
    assert any(float((files["one"][name] - weight).abs().max()) > 1e-3 for name, weight in files["batch"].items())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "--batch-size 6",
            "--batch-size must be a multiple of --queries-per-group, 4, got 6: queries that share their",
        ),
        ("--batch-size 0", "--batch-size must be a multiple of --queries-per-group, 4, got 0"),
        ("--warm-up 2.5", "--warm-up must be a number of steps, or a share of them below 1, got 2.5"),
        ("--warm-up -1", "--warm-up must be at least 0"),
        ("--warm-up nan", "--warm-up must be at least 0, got nan"),
        ("--warm-up 5 --scheduler constant", "--warm-up 5 does nothing with --scheduler constant; use constant_with"),
        ("--scheduler cosin", "--scheduler must be one of linear, cosine, .*, got 'cosin'"),
        ("--weight-decay -0.1", "--weight-decay must be at least 0"),
        ("--max-grad-norm inf", "--max-grad-norm must be"),
        ("--gradient-accumulation 0", "--gradient-accumulation must be at least 1, got 0"),
        ("--max-steps 0", "--max-steps must be at least 1, or -1 for --epochs"),
        ("--learning-rate inf", "--learning-rate"),
    ],
)
def test_schedules_that_cannot_be(job, tmp_path, capsys, options, message):
    assert train(job, tmp_path / "adapter", "--data", job / "data", *options.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and len(error) < 300
    assert not (tmp_path / "adapter").exists()


def test_two_trainings_into_one_folder(job, tmp_path, capsys):
    output, options = tmp_path / "new" / "adapter", ["--data", job / "data", "--max-steps", 1]
    with locked_folder(output):
        assert train(job, output, *options, "--overwrite") == 2
        assert capsys.readouterr().err == (
            f"qpeft train: error: {output} is being written by another process; let it end, or name another folder\n"
        )
        assert not list(output.iterdir())
    assert not output.exists()
    (output / ".adapter.0123456789ab.tmp").mkdir(parents=True)  # of a process that was killed
    assert train(job, output, *options) == 0
    assert not list(output.glob(".*"))
