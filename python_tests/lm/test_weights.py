"""An LM whose files lack a weight is refused: transformers alone would take random numbers in its place."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import qpeft_ext as qpeft
from qpeft_ext.lm.loading import BASE_LM

LACKING = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_without_some_of_its_weights(count, tmp_path):
    folder = tmp_path / "lm"
    shutil.copytree(BASE_LM, folder)
    file = folder / "model.safetensors"
    left = {name: value for name, value in load_file(file).items() if name not in LACKING[:count]}
    file.unlink()
    save_file(left, file, {"format": "pt"})
    words = f"lack the weight {LACKING[0]}{' and 1 more' if count == 2 else ''}, which would be random"
    with pytest.raises(ValueError, match=f"cannot load the base LM .*: its files {words}") as it:
        qpeft.load_lm(folder)
    assert "\n" not in str(it.value)


def test_a_folder_whose_index_lacks_a_weight(tmp_path):
    """The file has the weight, but the index of a sharded LM says what is read."""
    folder = tmp_path / "lm"
    shutil.copytree(BASE_LM, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    split = {"a.safetensors": list(weights)[:5], "b.safetensors": list(weights)[5:]}
    for name, keys in split.items():
        save_file({key: weights[key] for key in keys}, folder / name, {"format": "pt"})
    content = {"metadata": {}, "weight_map": {key: name for name, keys in split.items() for key in keys}}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(content))
    qpeft.load_lm(folder)
    content["weight_map"] = {key: name for key, name in content["weight_map"].items() if name == "a.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"lack the weight .* and {len(split['b.safetensors']) - 1} more"):
        qpeft.load_lm(folder)
