"""A complete reranking job: a BEIR folder, a tiny random Llama with its tokenizer, and a Q-PEFT-R adapter of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from families.tiny import tiny_lm, tiny_tokenizer
from small_data import write_folder

import qpeft_ext as qpeft


def save_lm(folder: Path, seed: int = 0, family: str = "llama") -> Path:
    tiny_lm(family, seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_adapter(folder: Path, lm: Path, **config) -> Path:
    model = qpeft.get_qpeft_model(qpeft.load_lm(lm), qpeft.QPeftConfig(**{"clues": "top_k", "rank": 8, **config}))
    model.save_pretrained(folder)
    return folder


def make_job(folder: Path) -> Path:
    """Write ``data`` (with run.trec), ``lm``, ``other_lm`` and ``adapter`` into ``folder``."""
    write_folder(folder / "data")
    save_lm(folder / "lm")
    save_lm(folder / "other_lm", seed=1)
    save_adapter(folder / "adapter", folder / "lm")
    return folder


def copy_job(job: Path, folder: Path) -> Path:
    """Copy a job, to damage the copy. The adapter's config names the LM, so that name is changed too."""
    shutil.copytree(job, folder)
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(job), str(folder)))
    return folder
