"""Adapters of `peft` in the LM (LoRA, DoRA, …): saved, and loaded from a folder that a stranger may have made.

Only safetensors are read, and nothing that the folder asks for is read, imported or fetched from elsewhere.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ..utils.files import save_folder_with
from ..utils.small_files import read_json
from ..utils.text import shorten
from .loading import one_line
from .sources import expect_plain_files

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# options of `peft` for which it loads something else: a Python module, a file of weights, other adapters
_LOADING = ("megatron_config", "prompt_tuning_init_state_dict_path", "adapters")
_SIZES = ("r", "init_r", "num_virtual_tokens", "encoder_hidden_size")  # of weights, in configs of `peft`
_MAX_ITERATIONS = 100  # of pissa_niter_N, which `peft` runs when it loads the adapter, too


def save_lm_adapter(lm: Any, folder: Path) -> None:
    """Save the adapters of an LM that are in force, as `peft` does: "default" in ``folder``, "x" in ``folder/x``.

    Adapters of an earlier save are removed. Others that the LM has, but does not use, are left out: what is loaded is
    in force.

    Args:
        lm: the LM, with an adapter.
        folder: made if it is not there.
    Raises: ValueError for an adapter without weights: it was merged into the LM, or unloaded, before.
    """
    from peft import PeftModel

    if not isinstance(lm, PeftModel):  # an adapter that transformers has put into the LM, and saves itself
        save_folder_with(folder, lm.save_pretrained)
        return
    names = list(lm.active_adapters)
    for name in names:
        if not _own_keys(lm, name):
            raise ValueError(
                f"cannot save the LM's adapter {name!r}: it has no weights, since it was merged into the LM or "
                "unloaded; save before that, or make a new model of the LM that merge_and_unload() returns"
            )
    save_folder_with(folder, partial(lm.save_pretrained, selected_adapters=names))
    for name, place in _places(folder).items():
        if name not in names:
            (place / _CONFIG).unlink()
            (place / _WEIGHTS).unlink(missing_ok=True)


def load_lm_adapter(lm: nn.Module, folder: Path, is_trainable: bool) -> nn.Module:
    """Put the adapters in ``folder`` on an LM; all of them are in force.

    Args:
        lm: the LM.
        folder: of `save_lm_adapter`.
        is_trainable: whether the adapters' weights get gradients.
    Returns: a `peft.PeftModel`.
    Raises: ValueError or FileNotFoundError, one line, for a folder that is damaged, that has no safetensors file, or
        whose config would load anything else.
    """
    from peft import PeftModel

    loaded: Any = None
    places = _checked_places(folder)
    for name, place in places.items():
        _expect_sizes(lm, place)
        with one_line(f"cannot load the LM's adapter {place}"):
            if loaded is None:
                loaded = PeftModel.from_pretrained(lm, place, adapter_name=name, is_trainable=is_trainable)
            else:
                loaded.load_adapter(str(place), name, is_trainable=is_trainable)
        _expect_keys(loaded, name, place)
    if len(places) > 1:
        loaded.base_model.set_adapter(list(places), inference_mode=not is_trainable)
    return loaded


def load_lm_adapter_weights(lm: Any, folder: Path, device: str) -> None:
    """Load the weights of ``folder`` into an LM that has the same adapters.

    Raises: as `load_lm_adapter`; ValueError for an adapter that the LM does not have.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    for name, place in _checked_places(folder).items():
        if name not in lm.peft_config:
            own = ", ".join(map(repr, lm.peft_config))
            raise ValueError(f"{place}: the adapter {name!r} is none of the LM's, {own}; name the LM's adapter so")
        _expect_keys(lm, name, place)
        with one_line(f"cannot load the LM's adapter {place}"):
            set_peft_model_state_dict(lm, load_peft_weights(str(place), device=device), adapter_name=name)


def unsaved_parameters(lm: Any) -> list[str]:
    """Name the parameters of an LM that require a gradient, and that no adapter in it saves.

    Args:
        lm: an LM, with adapters of `peft` or without.
    """
    trained = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if not trained or not hasattr(lm, "peft_config"):
        return list(trained)
    from peft import get_peft_model_state_dict

    saved = {
        tensor.data_ptr()
        for name in lm.peft_config
        for tensor in get_peft_model_state_dict(lm, adapter_name=name, save_embedding_layers=False).values()
    }
    return [name for name, parameter in trained.items() if parameter.data_ptr() not in saved]


def _places(folder: Path) -> dict[str, Path]:
    """Return the folder of each adapter by its name."""
    inside = sorted(path.parent for path in folder.glob(f"*/{_CONFIG}"))
    default = {"default": folder} if (folder / _CONFIG).exists() or not inside else {}
    return default | {place.name: place for place in inside}


def _checked_places(folder: Path) -> dict[str, Path]:
    places = _places(folder)
    for place in places.values():
        _check(place)
    return places


def _own_keys(lm: Any, name: str, with_embeddings: bool = False) -> set[str]:
    from peft import get_peft_model_state_dict

    return set(get_peft_model_state_dict(lm, adapter_name=name, save_embedding_layers=with_embeddings))


def _expect_keys(lm: Any, name: str, place: Path) -> None:
    """Check that a file has the weights of an adapter: `peft` leaves those as they are that it does not find."""
    from peft import PeftModel

    if not isinstance(lm, PeftModel):
        return
    with one_line(f"cannot load the LM's adapter {place}"), safe_open(place / _WEIGHTS, "pt") as file:
        written = set(file.keys())
    missing, unknown = sorted(_own_keys(lm, name) - written), sorted(written - _own_keys(lm, name, True))
    if missing or unknown:
        raise ValueError(
            f"{place / _WEIGHTS}: missing keys: {shorten(', '.join(missing) or 'none')}; unknown keys: "
            f"{shorten(', '.join(unknown) or 'none')}; save the adapter again"
        )


def _expect_sizes(lm: nn.Module, place: Path) -> None:
    """Check that a config asks for no more than the LM or the file has: `peft` makes weights of these sizes first."""
    config = read_json(place / _CONFIG)
    if config["peft_type"] == "LOKR":  # a rank above all sizes means that there is none, and makes nothing
        return
    ranks = config.get("rank_pattern")
    asked = {name: config.get(name) for name in _SIZES} | (ranks if isinstance(ranks, dict) else {})
    with one_line(f"cannot load the LM's adapter {place}"), safe_open(place / _WEIGHTS, "pt") as file:
        written = [size for key in file.keys() for size in file.get_slice(key).get_shape()]
    largest = max([*written, *(size for parameter in lm.parameters() for size in parameter.shape)], default=0)
    for name, size in asked.items():
        if isinstance(size, int | float) and size > largest:
            raise ValueError(
                f"cannot load the LM's adapter {place}: {_CONFIG} asks for {name}={shorten(size)}, and nothing in the "
                f"LM or in {_WEIGHTS} has more than {largest} rows or columns; save the adapter again"
            )


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
    if iterations and not (re.fullmatch("[0-9]{1,9}", iterations[1]) and int(iterations[1]) <= _MAX_ITERATIONS):
        raise ValueError(f"{path}: init_lora_weights must have at most {_MAX_ITERATIONS} iterations")
