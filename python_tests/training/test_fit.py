"""One call that trains: the settings it shares, checkpoints, evaluation, and resuming."""

import pytest
import torch
from training.tiny_training import EXAMPLES, tiny_model, trainer, weights

from qpeft_ext.training.fit import fit

pytestmark = pytest.mark.slow

SETTINGS = {"learning_rate": 1e-2, "batch_size": 4, "max_steps": 2}


def test_it_trains_as_the_trainer_does(tmp_path):
    by_hand = trainer(tmp_path / "trainer", tiny_model())
    by_hand.train()
    done = fit(tiny_model(), EXAMPLES, tmp_path / "fit", seed=by_hand.args.seed, **SETTINGS)
    for name, weight in weights(by_hand.model).items():
        assert torch.equal(weight, weights(done.trainer.model)[name])
    assert done.seconds > 0 and not done.before
    assert not list((tmp_path / "fit").glob("checkpoint-*"))


def test_checkpoints_are_evaluated_and_resumed_from(tmp_path, capsys):
    options = {
        "dev": EXAMPLES[:2],
        "evaluate_first": True,
        "save_every": 1,
        "log_every": 1,
        "bar": ("name", "eval_mrr"),
    }
    done = fit(tiny_model(), EXAMPLES, tmp_path, **SETTINGS, **options)
    assert {"eval_loss", "eval_mrr"} <= done.before.keys()
    assert done.trainer.args.load_best_model_at_end and done.trainer.state.best_model_checkpoint
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert "{'loss'" not in capsys.readouterr().out  # the bar takes the place of the log lines
    again = fit(tiny_model(), EXAMPLES, tmp_path, **SETTINGS | {"max_steps": 3}, resume=True)
    assert again.trainer.state.global_step == 3
