"""Adapters on disk, with the file names of `peft`: adapter_config.json, adapter_model.safetensors, README.md.

The adapters of a `peft` model that are in force are saved by `peft` in the sub-folder ``lm_adapter``; an LM that was
trained (``train_lm``) is saved as a whole in ``lm``, with its tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..config import QPeftConfig
from ..config.values import ANSWER
from ..evaluation.calibration import Calibration
from ..lm.adapter import load_lm_adapter, load_lm_adapter_weights, save_lm_adapter
from ..lm.arguments import expect_lm, expect_not_loaded, is_name
from ..lm.loading import files_digest, load_lm, load_tokenizer
from ..utils.files import name_what_cannot_be_read, naming, save_file_with, save_folder_with, write_text
from ..utils.hub import expect_in_reach
from ..utils.inputs import kind_of
from ..utils.small_files import read_json
from ..utils.text import shorten
from ..utils.torch_state import own_state
from .model_card import PLOT, model_card, reliability_svg, with_calibration
from .own_lm import expect_same_lm, finding_own_lm, revision_of

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
LM_ADAPTER, TRAINED_LM = "lm_adapter", "lm"
_TOKENIZER = "tokenizer_config.json", "tokenizer.json"  # of which a tokenizer's folder has one at least
_DOWNLOADED = ["*.json", "*.safetensors", "*.md", "*.svg", "*.txt", "*.model", "*.jinja"]  # the last of tokenizers
_TRAINED = "trained"  # in the weights' metadata: what the LM answered in training


@own_state()
def save_adapter(model, folder: str | os.PathLike[str]) -> None:
    """Save the trained modules; each file appears whole or not at all, the config last.

    Raises: ValueError if a weight is not finite; OSError if the folder cannot be written.
    """
    from ..utils.environment import VERSION

    folder = Path(folder)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(model).items()}
    _expect_finite(state, f"the adapter for {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot save an adapter to {folder}: it is not a folder") from None
    if hasattr(model.lm, "peft_config"):
        save_lm_adapter(model.lm, folder / LM_ADAPTER)
    elif (folder / LM_ADAPTER).is_symlink():  # of an earlier save, which loading would take for this one's
        (folder / LM_ADAPTER).unlink()
    elif (folder / LM_ADAPTER).is_dir():
        shutil.rmtree(folder / LM_ADAPTER)
    if model.qpeft_config.train_lm:
        _expect_finite(model.lm.state_dict(), f"the LM for {folder}")
        save_folder_with(folder / TRAINED_LM, lambda path: _save_with_tokenizer(model, path))
    config = model.qpeft_config.to_dict() | {"qpeft_version": VERSION}
    # one entry only: safetensors writes several in an order that changes from file to file
    about = {_TRAINED: json.dumps({name: config[name] for name in ANSWER})}
    save_file_with(folder / WEIGHTS, lambda path: save_file(state, path, metadata=about))
    _write_plot(folder, (model.qpeft_config.calibration or {}).get("measured") or {})
    write_card(model, folder)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n", follow=False)


def _save_with_tokenizer(model, folder: str) -> None:
    model.lm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def trained_lm(folder: Path, config: QPeftConfig) -> Path | None:
    """Return the folder of an LM that was trained and saved in an adapter with its tokenizer, or None.

    Earlier versions saved the LM without one.
    """
    own = folder / TRAINED_LM
    return own if config.train_lm and any((own / name).is_file() for name in _TOKENIZER) else None


def write_card(model, folder: str | os.PathLike[str]) -> None:
    """Write the model card of an adapter into a folder that is there."""
    from ..utils.environment import VERSION

    write_text(Path(folder) / CARD, model_card(model, VERSION), follow=False)


def _write_plot(folder: Path, measured: Mapping[str, Any]) -> None:
    """Write the plot that the card shows; without a calibration, remove that of an adapter which was here before."""
    if measured:
        write_text(folder / PLOT, reliability_svg(measured["bins"]), follow=False)
    elif (folder / PLOT).is_file() or (folder / PLOT).is_symlink():
        (folder / PLOT).unlink()


def save_calibration(folder: str | os.PathLike[str], calibration: Calibration) -> None:
    """Store a calibration in an adapter's folder: in its config, and in its model card with a plot.

    Args:
        folder: the adapter's.
        calibration: from `evaluation.calibration.calibrate`.
    Raises: FileNotFoundError or ValueError if the folder holds no adapter; OSError if it cannot be written.
    """
    folder = Path(folder)
    QPeftConfig.from_pretrained(folder)
    config = read_json(folder / CONFIG) | {"calibration": calibration.to_dict()}
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "# Q-PEFT adapter\n"
    _write_plot(folder, calibration.measured)
    write_text(folder / CARD, with_calibration(card, calibration.measured), follow=False)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n", follow=False)


def load_adapter(cls, folder, lm=None, tokenizer=None, is_trainable: bool = False, options=None, **lm_kwargs):
    """Load an adapter and, unless given, its base LM.

    Args:
        options: of the config, instead of those saved; not such as change the shapes of weights.
    Raises: FileNotFoundError for a missing file; ValueError for a damaged one, for keys that are missing or unknown,
        weights that are not finite, an LM other than the adapter's, or a dtype for an LM that is loaded already.
    """
    if "base_model" in lm_kwargs:  # as `Reranker` calls it; transformers would call it an argument of the LM's class
        raise TypeError("from_pretrained: the LM is the argument lm here, got base_model")
    if lm is not None and not is_name(lm):
        expect_lm("from_pretrained", lm)
    expect_not_loaded("from_pretrained", lm, lm_kwargs)
    folder = local_folder(folder)
    config = replace(QPeftConfig.from_pretrained(folder), **(options or {}))
    if config.calibration is not None:
        try:
            Calibration.from_dict(config.calibration)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
    if is_trainable:
        config = replace(config, calibration=None)  # it is of the weights before training
    state = read_weights(folder / WEIGHTS)
    _expect_same_answer(folder, config)
    if lm_kwargs.get("revision") is None and (lm is None or is_name(lm)):
        lm_kwargs = lm_kwargs | {"revision": revision_of(config, lm)}
    if config.train_lm:
        if lm is not None:
            raise ValueError(f"{folder} holds a whole LM, trained with train_lm=True; do not pass another")
        lm = load_lm(folder / TRAINED_LM, **lm_kwargs)
        if tokenizer is None:
            own = trained_lm(folder, config)
            with finding_own_lm(folder, config, own):
                tokenizer = load_tokenizer(own or config.base_model_name_or_path or "", **lm_kwargs)
    elif lm is None or is_name(lm):
        with finding_own_lm(folder, config, lm):
            lm = load_lm(config.base_model_name_or_path or "" if lm is None else lm, **lm_kwargs)
    if (folder / LM_ADAPTER).is_dir() and not hasattr(lm, "peft_config"):
        lm = load_lm_adapter(lm, folder / LM_ADAPTER, is_trainable)
    if tokenizer is None:
        name = getattr(lm, "name_or_path", None) or config.base_model_name_or_path
        tokenizer = _tokenizer_of(folder, name, lm_kwargs)
    model = cls(lm, config, tokenizer)
    expect_same_lm(folder, config, model.engine)
    _load_state(folder / WEIGHTS, model, state)
    for module in (*model.trained_modules.values(), *([model.lm] if config.train_lm else ())):
        module.requires_grad_(is_trainable)
    return model


def _tokenizer_of(folder: Path, base_lm: str | None, lm_kwargs: dict):
    if not base_lm:
        raise ValueError(f"{folder}: tokenizer must be given, because the base LM has no name")
    return load_tokenizer(base_lm, **lm_kwargs)


def load_weights_into(model, folder: str | Path) -> None:
    """Load the weights of an adapter folder into a model that has the same parts (resuming, the best checkpoint).

    Raises: as `load_adapter`.
    """
    folder = Path(folder)
    _load_state(folder / WEIGHTS, model, read_weights(folder / WEIGHTS))
    if model.qpeft_config.train_lm:
        trained = load_lm(folder / TRAINED_LM, dtype=model.engine.table.dtype)
        model.lm.load_state_dict(trained.state_dict())
    if hasattr(model.lm, "peft_config"):
        if not (folder / LM_ADAPTER).is_dir():
            raise FileNotFoundError(f"{folder} has no {LM_ADAPTER}, but the LM has an adapter")
        load_lm_adapter_weights(model.lm, folder / LM_ADAPTER, str(model.device))
    elif (folder / LM_ADAPTER).is_dir():
        raise ValueError(f"{folder} has an adapter of an LM, and this LM has none; give the LM with it")


def push_adapter(model, repo_id: str, **kwargs) -> str:
    """Upload an adapter; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    repo = api.create_repo(repo_id, exist_ok=True, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder).commit_url)


def adapter_digest(folder: Path) -> str:
    """A short fingerprint of an adapter's files."""
    return files_digest([*folder.glob("*"), *folder.glob(f"{LM_ADAPTER}/**/*"), *folder.glob(f"{TRAINED_LM}/*")])


def _state(model) -> dict[str, torch.Tensor]:
    return {
        prefix + name: tensor
        for prefix, module in model.trained_modules.items()
        for name, tensor in module.state_dict().items()
    }


@own_state()
def _load_state(path: Path, model, state: dict) -> None:
    own = _state(model)
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"{path}: missing keys: {', '.join(missing) or 'none'}; unknown keys: "
            f"{', '.join(unknown) or 'none'}; save the adapter again"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{path}: {name} must have shape {list(own[name].shape)}, got {list(tensor.shape)}")
    _expect_finite(state, str(path))
    for prefix, module in model.trained_modules.items():
        module.load_state_dict({name: state[prefix + name] for name in module.state_dict()})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is not a complete Q-PEFT adapter: it has no {path.name}")
    try:
        with naming(path):
            return load_file(path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(name_what_cannot_be_read(error)) from None
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); save the adapter again") from None


def _expect_same_answer(folder: Path, config: QPeftConfig) -> None:
    """Check that the LM answers as it did in training; weights of earlier versions do not say so.

    Raises: ValueError for a config in which that was changed.
    """
    with safe_open(folder / WEIGHTS, "pt") as weights:
        written = (weights.metadata() or {}).get(_TRAINED)
    try:
        trained = {} if written is None else dict(json.loads(written))
    except (TypeError, ValueError):
        raise ValueError(f"{folder / WEIGHTS}: its metadata is damaged; save the adapter again") from None
    now = config.to_dict()
    for name in ANSWER:
        if name in trained and trained[name] != now[name]:
            raise ValueError(
                f"{folder / CONFIG}: {name} is {shorten(now[name])}, and the weights beside it were trained with "
                f"{shorten(trained[name])}; set it back"
            )


def _expect_finite(state: dict[str, torch.Tensor], where: str) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: {name} has values that are not finite; train with a lower learning rate")


def adapter_config(folder: str | Path, asked: Mapping[str, object]) -> QPeftConfig:
    """Read the config of an adapter.

    Args:
        folder: as for `local_folder`.
        asked: options that a user gave beside the adapter; None where he did not.
    Raises: as `QPeftConfig.from_pretrained`; ValueError if the adapter was trained with another value of an option.
    """
    config = QPeftConfig.from_pretrained(local_folder(folder))
    for name, value in asked.items():
        if value is not None and value != (trained := getattr(config, name)):
            raise ValueError(
                f"{folder}: the adapter was trained with {name} {trained!r}, got {value!r}; leave "
                f"--{name.replace('_', '-')} out"
            )
    return config


def local_folder(folder: str | Path) -> Path:
    """The adapter's folder; an adapter named by a Hub id is downloaded.

    Raises: FileNotFoundError if there is none; TypeError for what is no name.
    """
    if not is_name(folder) or not str(folder):
        raise TypeError(f"the adapter must be a folder or a Hub id, got {kind_of(folder)}")
    path = Path(folder)
    if path.is_dir():
        return path
    if str(folder).startswith(("/", ".", "~")) or str(folder).count("/") != 1:
        raise FileNotFoundError(f"there is no adapter folder {folder}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        expect_in_reach(str(folder), (CONFIG,), {})
        return Path(snapshot_download(str(folder), allow_patterns=_DOWNLOADED))
    except RepositoryNotFoundError:
        reason = "there is no such folder, and the Hub has no such repository, or not for you (HF_TOKEN)"
    except Exception as error:  # also those of the connection, which are no OSErrors
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 200 else f"{reason[:199]}…"
    raise FileNotFoundError(f"cannot load the adapter {str(folder)!r}: {reason}")
