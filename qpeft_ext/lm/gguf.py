"""LMs in GGUF files: each is converted once, into a folder of the cache that transformers reads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.files import cache_folder, drop_temporary, private_folder, save_folder_with
from ..utils.locks import claim
from ..utils.progress import progress_bar
from .gguf_header import read_header
from .weights import load_weights

_VERSION = 3  # of what `_convert` makes and refuses; raised so that earlier folders are made anew
# tokenizers of llama.cpp that split off every digit; without that, blank lines before a number are other tokens
_EVERY_DIGIT = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_REQUIRED = ("gguf", "accelerate")  # by transformers, for GGUF files


def sha256_of(parts: Sequence[Path]) -> str:
    """Return the SHA-256 of files one after another; a file that is unchanged is read once in a process."""
    stats = [(path, os.stat(path)) for path in parts]
    return _sha256(tuple((path, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats))


@functools.lru_cache(maxsize=8)
def _sha256(parts: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in parts:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def converted(parts: Sequence[Path], sha256: str) -> Path:
    """Return the folder with the LM and the tokenizer of a GGUF file, which is made if it is not in the cache.

    Packed weights are unpacked to bfloat16. The folder appears when it is complete; one process converts at a time, and
    others wait for it. The config keeps the SHA-256 as ``gguf_sha256``.

    Args:
        parts: the file, or several that make it up one after another.
        sha256: of the file, from `sha256_of`.
    Raises: ImportError if a package is missing; ValueError for a file that is damaged, or that this version of
        transformers cannot read; OSError if the cache folder cannot be written.
    """
    root = cache_folder() / "gguf"
    folder = root / f"{sha256}-{_VERSION}"
    if folder.is_dir():
        return folder
    for package in _REQUIRED:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"GGUF files need the package {package}: pip install 'qpeft_ext[gguf]'")
    if len(parts) == 1:
        read_header(parts[0])  # an error before anything is written
    with _writing(root), claim(root, wait=True):
        root.mkdir(exist_ok=True)
        if not folder.is_dir():
            drop_temporary(root)
            with private_folder(folder) as private:
                join_parts(parts, private / "lm.gguf")
                save_folder_with(folder, lambda target: _convert(private / "lm.gguf", sha256, target, parts[0].name))
    return folder


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by transformers, about the file
            raise
        reason = os.strerror(error.errno)
        raise OSError(
            f"cannot write to the cache folder {root} ({reason}); set QPEFT_CACHE to a folder that can be written"
        ) from None


def join_parts(parts: Sequence[Path], target: Path) -> None:
    """Make one file of the parts; a single one is linked, not copied."""
    if len(parts) == 1:
        target.symlink_to(parts[0].absolute())
        return
    with open(target, "wb") as file:
        for path in parts:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)


def _convert(path: Path, sha256: str, target: str, name: str) -> None:
    """Let transformers read a GGUF file, and save what it makes of it to a folder.

    Args:
        path: of the file, which is alone in its folder: transformers would also read an adapter beside it.
        name: of the file, for the progress bar.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    header = read_header(path)
    size = path.stat().st_size / 1e6
    with progress_bar(total=2, desc=f"convert {name} ({size:.0f} MB), once", unit="part") as bar:
        folder, file = str(path.parent), path.name
        config = AutoConfig.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        auto: type[Any] = AutoModelForCausalLM
        if getattr(config, "is_encoder_decoder", False):
            auto = AutoModelForSeq2SeqLM
        lm = load_weights(auto, folder, gguf_file=file, dtype=header.dtype, **_unpacked())
        lm.config.gguf_sha256 = sha256
        lm.config.__dict__.pop("quantization_config", None)  # save_pretrained refuses a model that was packed
        lm.hf_quantizer = None
        lm.save_pretrained(target)
        del lm
        bar.update()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, trust_remote_code=False)
        if header.splitting in _EVERY_DIGIT:
            tokenizer.backend_tokenizer.pre_tokenizer = _split_every_digit()
        tokenizer.save_pretrained(target)
        bar.update()


def _split_every_digit() -> Any:
    """Return the rule that transformers leaves out: digits are split off first, then come those of GPT-2."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


def _unpacked() -> dict[str, Any]:
    """Return the argument that makes transformers unpack the weights; versions without it always do."""
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}
