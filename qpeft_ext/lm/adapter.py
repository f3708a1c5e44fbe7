"""Adapters of `peft` in the LM (LoRA, DoRA, …), loaded from a folder that a stranger may have made.

Only safetensors are read, and nothing that the folder asks for is read, imported or fetched from elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from ..utils.small_files import read_json
from .loading import one_line
from .sources import expect_plain_files

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# options of `peft` for which it loads something else: a Python module, a file of weights, other adapters
_LOADING = ("megatron_config", "prompt_tuning_init_state_dict_path", "adapters")
_MAX_ITERATIONS = 100  # of pissa_niter_N, which `peft` runs when it loads the adapter, too


def load_lm_adapter(lm: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    """Put the adapter in ``folder`` on an LM.

    Args:
        lm: the LM.
        folder: as `peft` saves it.
        is_trainable: whether the adapter's weights get gradients.
    Returns: a `peft.PeftModel`.
    Raises: ValueError or FileNotFoundError, one line, for a folder that is damaged, that has no safetensors file, or
        whose config would load anything else.
    """
    from peft import PeftModel

    _check(folder)
    with one_line(f"cannot load the LM's adapter {folder}"):
        return PeftModel.from_pretrained(lm, folder, is_trainable=is_trainable)


def load_lm_adapter_weights(lm: nn.Module, folder: Path, device: str) -> None:
    """Load the weights of ``folder`` into an LM that has the same adapter.

    Raises: as `load_lm_adapter`.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    _check(folder)
    with one_line(f"cannot load the LM's adapter {folder}"):
        set_peft_model_state_dict(lm, load_peft_weights(str(folder), device=device))


def _check(folder: Path) -> None:
    expect_plain_files(folder)
    if not (folder / _WEIGHTS).is_file():
        other = " (what it has is a pickle, which is not loaded)" if list(folder.glob("*.bin")) else ""
        raise FileNotFoundError(f"{folder} has no {_WEIGHTS}{other}; save the adapter again, with safetensors")
    path = folder / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a complete adapter of peft: it has no {_CONFIG}")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path}: expected a config of peft, with a peft_type; save the adapter again")
    for name in _LOADING:
        if config.get(name):
            raise ValueError(
                f"{path}: {name} makes peft load something from outside the folder; expected an adapter "
                "that is whole in it"
            )
    iterations = re.fullmatch(r"pissa_niter_(.*)", str(config.get("init_lora_weights")))
    if iterations and not (iterations[1].isdigit() and int(iterations[1][:9]) <= _MAX_ITERATIONS):
        raise ValueError(f"{path}: init_lora_weights must have at most {_MAX_ITERATIONS} iterations")
