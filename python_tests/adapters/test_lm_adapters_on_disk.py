"""Adapters of peft in the LM, saved with the model: whatever their names are, and however many."""

from __future__ import annotations

import pytest
import torch
from families.tiny import PAIRS, tiny_lm, tiny_tokenizer
from safetensors.torch import load_file, save_file
from training.tiny_training import EACH_STEP, EXAMPLES, assert_close, tiny_model, trainer, weights

import qpeft_ext as qpeft

peft = pytest.importorskip("peft")


def lora(**options):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def lm_with(*names: str, **options):
    """The tiny LM with one random adapter of each name; the last one is in force."""
    torch.manual_seed(3)
    options = {"init_lora_weights": False} | options
    lm = peft.get_peft_model(tiny_lm("llama"), lora(**options), adapter_name=names[0])
    for name in names[1:]:
        lm.add_adapter(name, lora(**options))
    lm.set_adapter(names[-1])
    return lm


def scores(model) -> torch.Tensor:
    return model.score(PAIRS).query_log_likelihood


def loaded(folder, **options) -> qpeft.QPeftModel:
    return qpeft.QPeftModel.from_pretrained(folder, lm=tiny_lm("llama"), tokenizer=tiny_tokenizer(), **options)


@pytest.mark.parametrize("names", [("default",), ("mine",), ("default", "mine"), ("mine", "default"), ("one", "two")])
def test_the_adapter_in_force_is_what_is_loaded(names, tmp_path):
    model = tiny_model(lm_with(*names), clues="none")
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(scores(again), scores(model))
    assert list(again.lm.peft_config) == [names[-1]]
    assert not any(p.requires_grad for p in again.lm.parameters())
    assert any(p.requires_grad for p in loaded(tmp_path, is_trainable=True).lm.parameters())


def test_two_adapters_in_force(tmp_path):
    model = tiny_model(lm_with("default", "mine"), clues="none")
    one = scores(model)
    model.save_pretrained(tmp_path)
    model.lm.base_model.set_adapter(["default", "mine"])
    both = scores(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(loaded(tmp_path)), both) and not torch.equal(both, one)
    model.lm.set_adapter("mine")
    model.save_pretrained(tmp_path)  # "default" of the save before must not come back
    assert torch.equal(scores(loaded(tmp_path)), one)


def test_an_adapter_of_an_earlier_save_does_not_come_back(tmp_path):
    tiny_model(lm_with("default"), clues="top_k").save_pretrained(tmp_path)
    model = tiny_model(clues="top_k")
    with pytest.raises(ValueError, match="has an adapter of an LM, and this LM has none"):
        trainer(tmp_path, model)._load_from_checkpoint(tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(loaded(tmp_path)), scores(model))


def test_checkpoints_of_an_adapter_with_a_name(tmp_path):
    settings = {"max_steps": 4, "deterministic": True}
    whole, resumed = (
        trainer(tmp_path, tiny_model(lm_with("mine", init_lora_weights=True)), dev=EXAMPLES[:2], **EACH_STEP | settings)
        for _ in range(2)
    )
    whole.train()  # which loads the best checkpoint at its end
    resumed.train(str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_close(weights(resumed.model), weights(whole.model), 0)
    other = trainer(tmp_path, tiny_model(lm_with("other")), **settings)
    with pytest.raises(ValueError, match="the adapter 'mine' is none of the LM's, 'other'"):
        other.train(str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("change, message", [("drop", "missing keys: .*lora_B"), ("add", "unknown keys: .*lora_C")])
def test_an_adapter_with_other_weights_is_refused(change, message, tmp_path):
    """`peft` alone would leave the weights that are missing at their initial values."""
    model = tiny_model(lm_with("default"), clues="none")
    model.save_pretrained(tmp_path)
    path = tmp_path / "lm_adapter" / "adapter_model.safetensors"
    state = load_file(path)
    name = next(name for name in state if "lora_B" in name)
    changed = state | {name.replace("lora_B", "lora_C"): state[name].clone()}
    if change == "drop":
        changed = {own: tensor for own, tensor in state.items() if own != name}
    save_file(changed, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)


def test_an_adapter_that_was_merged_is_not_saved_empty(tmp_path):
    model = tiny_model(lm_with("default"), clues="none")
    model.lm.merge_and_unload()
    with pytest.raises(ValueError, match="cannot save the LM's adapter 'default': it has no weights, since it was mer"):
        model.save_pretrained(tmp_path)


def test_weights_of_the_lm_that_no_adapter_saves(tmp_path):
    lm = lm_with("default", modules_to_save=["lm_head"], bias="all")
    trainer(tmp_path, tiny_model(lm))  # all that is trained is saved
    lm.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"does not save them \(base_model.model.model.norm.weight, 1 in all\)"):
        trainer(tmp_path, tiny_model(lm))
