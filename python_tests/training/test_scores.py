"""Training by an answer behind the query: every kind with its losses learns, is saved, resumed and loaded bit-equal."""

import pytest
import torch
from families.tiny import tiny_lm, tiny_tokenizer
from safetensors.torch import load_file, save_file
from training.tiny_training import EACH_STEP, EXAMPLES, tiny_model, trainer, weights

import qpeft_ext as qpeft

pytestmark = pytest.mark.slow

WORDS = {"yes_words": ("y",), "no_words": ("n",)}
LORA = {"clues": "top_k", "generated_lora_rank": 2, "target_modules": "all-linear"}
TAUGHT = [
    example | {"positive_scores": [4.0], "negative_scores": [0.5, 1.0, 2.0]} for example in EXAMPLES
]  # as a teacher's grades
PAIRS = [(example["query"], document) for example in EXAMPLES[:3] for document in example["negatives"]]


@pytest.mark.parametrize(("score", "loss"), [
    ("yes_no", "binary_cross_entropy"), ("yes_no", "listwise"), ("yes_no", "ranknet"), ("yes_no", "lambda_loss"),
    ("graded", "margin_mse"), ("graded", "kl_divergence"), ("both", "listwise"), ("both", "contrastive"),
])  # fmt: skip
def test_a_score_is_trained_saved_and_loaded(score, loss, tmp_path):
    taught = loss in ("margin_mse", "kl_divergence")
    options = LORA | (WORDS if score != "graded" else {}) | {"in_batch_negatives": not taught}
    lm = tiny_lm("llama")
    model, examples = tiny_model(lm, score=score, loss=loss, **options), TAUGHT if taught else EXAMPLES
    steps = {"max_steps": 20, "learning_rate": 2e-2, "lr_scheduler_type": "constant"}
    run = trainer(tmp_path / "run", model, examples, examples, **steps)
    before = run.evaluate()
    start = weights(model)
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"] and after["eval_accuracy"] >= before["eval_accuracy"]
    moved = {name for name, weight in weights(model).items() if not torch.equal(weight, start[name])}
    assert moved == start.keys() and ("mixed_score.weight" in moved) is (score == "both")
    model.save_pretrained(tmp_path / "adapter")
    loaded = qpeft.QPeftModel.from_pretrained(tmp_path / "adapter", lm, tiny_tokenizer())
    assert loaded.qpeft_config == model.qpeft_config and loaded.qpeft_config.score == score
    assert torch.equal(loaded.score(PAIRS).compared, model.score(PAIRS).compared)


def test_a_resumed_training_ends_the_same(tmp_path):
    def run(folder, **args):
        model = tiny_model(score="both", **LORA, **WORDS)
        return model, trainer(folder, model, dev=EXAMPLES[:4], deterministic=True, max_steps=3, **EACH_STEP | args)

    whole, once = run(tmp_path / "once")
    once.train()
    _, first = run(tmp_path / "twice", save_strategy="steps")
    first.args.max_steps = 3
    first.train()
    resumed, second = run(tmp_path / "twice")
    second.train(resume_from_checkpoint=str(tmp_path / "twice" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(resumed).values(), strict=True))


def test_the_weight_alone_is_trained_without_clues(tmp_path):
    """A fusion of likelihood and log-odds of the frozen LM."""
    model = tiny_model(score="both", clues="none", **WORDS)
    assert list(weights(model)) == ["mixed_score.weight"]
    trainer(tmp_path, model).train()
    assert float(model.mixed_score.weight.detach()) != pytest.approx(0.1)


def test_predictions_are_scores(tmp_path):
    model = tiny_model(score="yes_no", **WORDS)
    found = trainer(tmp_path, model).predict(EXAMPLES[:2]).predictions
    pairs = [(e["query"], d) for e in EXAMPLES[:2] for d in (*e["positives"], *e["negatives"])]
    expected = model.score(pairs).answer.view(2, 4)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
    ranked = qpeft.Reranker(model).predict(pairs)
    torch.testing.assert_close(torch.from_numpy(ranked).view(2, 4), expected, rtol=0, atol=1e-5)


def test_weights_that_lack_a_part_of_the_score(tmp_path):
    """Weights of yes/no under the config of both, without their note of what was trained, as earlier versions wrote."""
    lm, weights = tiny_lm("llama"), tmp_path / "yes_no" / "adapter_model.safetensors"
    for score in ("yes_no", "both"):
        tiny_model(lm, score=score, **WORDS).save_pretrained(tmp_path / score)
    (tmp_path / "yes_no" / "adapter_config.json").write_bytes((tmp_path / "both" / "adapter_config.json").read_bytes())
    save_file(load_file(weights), weights)
    with pytest.raises(ValueError, match=r"missing keys: mixed_score.weight; unknown keys: none") as error:
        qpeft.QPeftModel.from_pretrained(tmp_path / "yes_no", lm, tiny_tokenizer())
    assert "\n" not in str(error.value)


def test_rows_of_the_head_that_a_pair_takes():
    query, of_words = "moon", 4 / len(tiny_model().engine.table)  # "y", "Y", "n" and "N"
    tokens = len(tiny_tokenizer()(f" {query}", add_special_tokens=False)["input_ids"])  # as it follows "Question:"
    assert tiny_model().head_rows(query) == tokens > 0
    assert tiny_model(score="yes_no", **WORDS).head_rows(query) == pytest.approx(of_words)
    assert tiny_model(score="both", **WORDS).head_rows(query) == pytest.approx(tokens + of_words)
