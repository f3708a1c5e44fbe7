"""The systems that bench_reranking.py compares, and what each of them must compute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cached_torch import CachedTorch
from llama_cpp_scores import LlamaCppScores
from random_llama import make_model
from shared_candidates import LONGEST_DOCUMENT, Pairs, Setting
from torch import nn

import qpeft_ext as qpeft

UPR_BATCH = 16


class Systems:
    """Each takes the pairs of a part and returns their scores, [B] float32.

    Args:
        setting: how much is reranked, and the shape of the LM.
        device, dtype: of the LM.
        cache_bytes: memory for prefixes, and as much on the disk.
        folder: where files may be written.
        model: an LM with its prompt; None: a Llama of the setting's shape with random weights and clues.
        gguf: the file that the LM was unpacked from, for llama.cpp; None: llama.cpp does not run.
    """

    def __init__(
        self,
        setting: Setting,
        device,
        dtype: torch.dtype,
        cache_bytes: int,
        folder: Path,
        model: qpeft.QPeftModel | None = None,
        gguf: Path | None = None,
    ) -> None:
        self.setting, self.device, self.folder = setting, torch.device(device), folder
        options = {"max_document_tokens": LONGEST_DOCUMENT}
        self.model = (model or make_model(setting.shape, device, "attention", dtype, **options)).eval()
        self.cache_bytes = cache_bytes
        self.cache = self.disk_cache = None
        self.torch_with_dict = CachedTorch(self.model)
        self.llama_cpp = None if gguf is None else LlamaCppScores(self.model, gguf, torch.get_num_threads())
        # its words are those of the tokenizer of random_llama.py
        self.cross_encoder_model = self._load_cross_encoder() if model is None else None

    def ours(self) -> dict[str, Callable[[Pairs], np.ndarray]]:
        return {"cold": self.ours_cold, "warm": self.ours_warm, "disk": self.ours_disk}

    def baselines(self) -> dict[str, Callable[[Pairs], np.ndarray]]:
        systems = {
            "cached_torch_cold": self.cached_torch_cold,
            "cached_torch_warm": self.cached_torch_warm,
            "plain": self.plain,
            "padded_unsorted": self.padded_unsorted,
        }
        if self.llama_cpp:
            systems |= {"llama_cpp_cold": self.llama_cpp_cold, "llama_cpp_warm": self.llama_cpp_warm}
        if self.cross_encoder_model:
            systems["cross_encoder"] = self.cross_encoder
        return systems

    def ours_cold(self, part: Pairs) -> np.ndarray:
        """Score with an empty cache, which is filled on the way."""
        self.cache = qpeft.DocumentCache(self.cache_bytes)
        return self.ours_warm(part)

    def ours_warm(self, part: Pairs) -> np.ndarray:
        return qpeft.Reranker(self.model, cache=self.cache).predict(part.texts(), show_progress_bar=False)

    def ours_disk(self, part: Pairs) -> np.ndarray:
        """Score with prefixes in files of an earlier process, which are read once and then kept in memory."""
        return qpeft.Reranker(self.model, cache=self.disk_cache).predict(part.texts(), show_progress_bar=False)

    @torch.no_grad()
    def write_files(self, part: Pairs) -> None:
        """Write what `ours_disk` reads, and let the system drop it from its page cache."""
        folder = self.folder / "prefixes"
        if self.disk_cache is not None:
            self.disk_cache.tiers["disk"]._lock.close()  # as the end of a process would
            shutil.rmtree(folder)
        writer = qpeft.DocumentCache(0, disk=folder, disk_bytes=self.cache_bytes)
        for prefix in self.model.encode(part.texts()).documents:
            self.model.engine.cached_prefill([prefix.ids], writer)
        writer.tiers["disk"]._lock.close()
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self.disk_cache = qpeft.DocumentCache(self.cache_bytes, disk=folder, disk_bytes=self.cache_bytes)

    def cached_torch_cold(self, part: Pairs) -> np.ndarray:
        self.torch_with_dict.prefixes.clear()
        return self.cached_torch_warm(part)

    def cached_torch_warm(self, part: Pairs) -> np.ndarray:
        return self.torch_with_dict.score(part.texts())

    def llama_cpp_cold(self, part: Pairs) -> np.ndarray:
        self.llama_cpp.states.clear()
        return self.llama_cpp_warm(part)

    def llama_cpp_warm(self, part: Pairs) -> np.ndarray:
        return self.llama_cpp.score(part.texts())

    def plain(self, part: Pairs) -> np.ndarray:
        return qpeft.Reranker(self.model, path="plain").predict(part.texts(), show_progress_bar=False)

    def padded_unsorted(self, part: Pairs) -> np.ndarray:
        scores, texts = [], part.texts()
        for start, stop in _groups_of_one_query(part.pairs, UPR_BATCH):
            batch = self.model.score(texts[start:stop], path="plain", max_tokens_per_batch=1 << 30)
            scores.append(batch.query_log_likelihood.float().cpu().numpy())
        return np.concatenate(scores)

    def cross_encoder(self, part: Pairs) -> np.ndarray:
        return self.cross_encoder_model.predict(self._cross_encoder_texts(part), show_progress_bar=False)

    def _cross_encoder_texts(self, part: Pairs) -> list[tuple[str, str]]:
        head = f"<s> {self.model.qpeft_config.instruction} Passage:"
        return [(f"{head} {document}", f"w6 w7 w8 w9 {query}") for query, document in part.texts()]

    def _load_cross_encoder(self):
        try:
            from sentence_transformers import CrossEncoder
            from sentence_transformers.base.modules import Transformer
            from sentence_transformers.cross_encoder.modules import LogitScore
        except ImportError as error:
            print(f"cross_encoder is left out: sentence-transformers cannot be imported ({error})")
            return None
        self.model.lm.save_pretrained(self.folder / "lm")
        self.model.tokenizer.pad_token = "</s>"
        self.model.tokenizer.save_pretrained(self.folder / "lm")
        dtype = {"dtype": self.model.engine.table.dtype}
        lm = Transformer(str(self.folder / "lm"), transformer_task="text-generation", model_kwargs=dtype)
        modules = [lm, LogitScore(true_token_id=10)]
        return CrossEncoder(modules=modules, device=str(self.device), activation_fn=torch.nn.Identity())

    @torch.no_grad()
    def cross_encoder_oracle(self, part: Pairs) -> np.ndarray:
        """Compute the logits of the cross-encoder by the LM itself, one pair at a time."""
        scores = []
        for document, query in self._cross_encoder_texts(part):
            ids = self.model.tokenizer([f"{document} {query}"], add_special_tokens=False, return_tensors="pt").input_ids
            scores.append(float(self.model.lm(ids.to(self.device), logits_to_keep=1).logits[0, -1, 10]))
        return np.array(scores, dtype=np.float32)


def _groups_of_one_query(pairs: list[tuple[int, int]], size: int):
    start = 0
    for i in range(1, len(pairs) + 1):
        if i == len(pairs) or pairs[i][0] != pairs[start][0] or i - start == size:
            yield start, i
            start = i


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of an LM: for a token, for a token that another attends to, and for a row of the head."""

    token: int
    attended: int
    head_row: int

    @classmethod
    def of(cls, lm) -> Costs:
        """Count those of a Llama; clue modules, a few per cent, are not counted."""
        config, decoder = lm.config, lm.get_decoder()
        linear = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attended = 2 * config.num_hidden_layers * config.num_attention_heads * width
        return cls(linear, attended, config.vocab_size * config.hidden_size)


@dataclass
class Tokens:
    """Counts, without padding: tokens through the LM, tokens that these attend to, and rows through the head."""

    tokens: int = 0
    attended: int = 0
    head_rows: int = 0

    def add(self, before: int, new: int, head_rows: int) -> None:
        self.tokens += new
        self.attended += new * before + new * (new + 1) // 2
        self.head_rows += head_rows

    def flops(self, costs: Costs) -> float:
        """Return the FLOPs, two for a multiply-add."""
        return 2 * (costs.attended * self.attended) + self.linear_flops(costs)

    def linear_flops(self, costs: Costs) -> float:
        """Return those of linear layers and the head, without attention."""
        return 2 * (costs.token * self.tokens + costs.head_row * self.head_rows)


def count_tokens(systems: Systems, data: Pairs) -> dict[str, Tokens]:
    """Count for each system what it must compute."""
    model, counts = systems.model, {name: Tokens() for name in ("cold", "warm", "plain", "cross_encoder")}
    batch = model.encode(data.texts())
    pieces = model.prompt.suffix
    for document in batch.documents:
        counts["cold"].add(0, len(document.ids), 0)
    for q, d in batch.pairs:
        prefix, query = len(batch.documents[d].ids), len(batch.queries[q])
        around, _, _ = pieces.lay_out((), 0 if model.clues is None else query)
        suffix = len(around) + query - 1  # the last one is only a target
        counts["cold"].add(prefix, suffix, query)
        counts["warm"].add(prefix, suffix, query)
        counts["plain"].add(0, prefix + suffix, query)
        counts["cross_encoder"].add(0, prefix + len(pieces.bare_question) + query, 1)
    counts["padded_unsorted"] = counts["plain"]
    counts["disk"] = counts["cached_torch_warm"] = counts["llama_cpp_warm"] = counts["warm"]
    counts["cached_torch_cold"] = counts["llama_cpp_cold"] = counts["cold"]
    return counts
