"""The automatic temperature: by hand, and in training."""

import dataclasses
import json
import math

import pytest
import torch
from training.tiny_training import EXAMPLES, Stream, tiny_model, trainer

from qpeft_ext import QPeftConfig
from qpeft_ext.training.checkpoints import mark_complete
from qpeft_ext.training.losses import configured_loss
from qpeft_ext.training.sampling import first_members
from qpeft_ext.training.temperature import best_temperature

pytestmark = pytest.mark.slow


def tables(*rows: list[float]):
    """A group for each row of likelihoods, of which the first is the positive."""
    return [
        (
            torch.tensor([row]),
            torch.tensor([[True, *[False] * (len(row) - 1)]]),
            torch.ones(1, len(row), dtype=torch.bool),
            torch.arange(len(row))[None],
            None,
        )
        for row in rows
    ]


def test_by_hand():
    """Three of four equal differences of 0.3 nats are the right way: a softmax is right with odds of 3, at 0.3 / ln 3.

    That is more than the deviation of 0.15, which is the most.
    """
    config = QPeftConfig(loss="listwise")
    often = tables(*[[0.0, -0.3]] * 19, [0.0, 0.3])
    assert best_temperature(config, often) == pytest.approx(0.3 / math.log(19), rel=0.05)
    assert best_temperature(config, tables([0.3, 0.0], [0.0, -0.3], [-1.0, -1.3], [0.0, 0.3])) == 0.15


def test_scaled_likelihoods_scale_it():
    torch.manual_seed(0)
    likelihood = torch.randn(8, 5)
    likelihood[:, 0] += 1
    config = QPeftConfig(loss="listwise")
    large, small = (best_temperature(config, tables(*(scale * likelihood).tolist())) for scale in (1, 0.1))
    assert large == pytest.approx(10 * small, rel=0.05)


def test_bounds():
    config = QPeftConfig(loss="listwise")
    easy = best_temperature(config, tables([0.0, -0.1]))
    assert 0.0025 <= easy < 0.01  # nothing is wrong: a twentieth of the deviation, or where the loss is 0 in float32
    assert best_temperature(config, tables([0.0, 1.0])) == 0.5  # everything is
    for row in ([math.nan, 0.0], [-1.0, -1.0]):
        with pytest.raises(ValueError, match="temperature='auto': expected scores that differ between docum"):
            best_temperature(config, tables(row))


def test_padding_does_not_count():
    ((likelihood, positive, mask, document, _),) = tables([0.0, -0.1, 50.0])
    mask[0, 2] = False
    config = QPeftConfig(loss="listwise")
    assert best_temperature(config, [(likelihood, positive, mask, document, None)]) == best_temperature(
        config, tables([0.0, -0.1])
    )


def test_with_a_teacher_the_deviations_are_equal():
    config = QPeftConfig(loss="margin_mse", in_batch_negatives=False)
    ((likelihood, *rest, _),) = tables([0.0, -0.2, -0.4])
    assert best_temperature(config, [(likelihood, *rest, 5 * likelihood + 3)]) == 0.2
    assert best_temperature(config, [(likelihood, *rest, 0 * likelihood)]) == 0.16  # a teacher without an opinion


@pytest.mark.parametrize("loss", ["listwise", "contrastive"])
def test_training_finds_it_first(tmp_path, loss):
    model = tiny_model(loss=loss)
    run = trainer(tmp_path, model, EXAMPLES[:4], max_steps=1, learning_rate=1.0)
    run.evaluate(EXAMPLES[:4])
    config = model.qpeft_config
    found = config.temperature
    inputs = run._collators[True](first_members(EXAMPLES[:4], config, run.args.seed, shuffle=True, count=4))
    assert inputs["queries"] == 4

    def loss_at(temperature: float) -> float:
        with torch.no_grad():
            table = run._likelihood_table(model, inputs)
        names = ("positive", "mask", "document", "teacher_scores")
        changed = dataclasses.replace(config, temperature=temperature)
        return float(configured_loss(changed, table, *(inputs[name] for name in names)))

    spread = float(run._likelihood_table(model, inputs).detach().std(1, correction=0).square().mean().sqrt())
    assert found < 1.01 * spread and loss_at(found) < loss_at(found * 0.9)
    assert loss_at(found) < loss_at(found * 1.1) or found > 0.99 * spread
    run.train()
    assert config.temperature == found  # after a step another one may be better: it is not looked for again
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["temperature"] == found


def test_a_resumed_run_has_that_of_its_checkpoint(tmp_path):
    run = trainer(tmp_path, tiny_model(loss="listwise"), max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    found = run.model.qpeft_config.temperature
    changed = tmp_path / "checkpoint-1" / "adapter_config.json"
    values = json.loads(changed.read_text())
    assert values["temperature"] == found
    changed.write_text(json.dumps(values | {"temperature": 0.77}))
    mark_complete(changed.parent)
    again = trainer(tmp_path, tiny_model(loss="listwise"), max_steps=2)
    again.train(resume_from_checkpoint=str(changed.parent))
    assert again.model.qpeft_config.temperature == 0.77


def test_a_stream_and_evaluation_alone(tmp_path):
    model = tiny_model(loss="listwise")
    trainer(tmp_path, model, Stream(), max_steps=1).train()
    alone = tiny_model(loss="listwise")
    trainer(tmp_path, alone, None, EXAMPLES[:4]).evaluate()
    assert 0 < model.qpeft_config.temperature < 10 and 0 < alone.qpeft_config.temperature < 10


def test_evaluation_of_what_only_the_call_names(tmp_path):
    expected, given, predicted = (tiny_model(loss="listwise") for _ in range(3))
    trainer(tmp_path, expected, None, EXAMPLES[:4]).evaluate()
    trainer(tmp_path, given, None).evaluate(EXAMPLES[:4])
    trainer(tmp_path, predicted, None).predict(EXAMPLES[:4])
    assert 0 < expected.qpeft_config.temperature < 10
    assert {m.qpeft_config.temperature for m in (given, predicted)} == {expected.qpeft_config.temperature}


def test_other_losses_and_numbers_are_left_alone(tmp_path):
    for options, expected in (({"loss": "pairwise"}, "auto"), ({"loss": "listwise", "temperature": 0.3}, 0.3)):
        model = tiny_model(**options)
        trainer(tmp_path, model, max_steps=1).train()
        assert model.qpeft_config.temperature == expected


def test_without_the_trainer_it_must_be_a_number():
    (group,) = tables([0.0, 1.0])
    with pytest.raises(ValueError, match="loss='listwise' needs a number for its temperature"):
        configured_loss(QPeftConfig(loss="listwise"), *group)
