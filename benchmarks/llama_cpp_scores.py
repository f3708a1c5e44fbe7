"""The baseline llama.cpp: likelihoods of queries from a GGUF file, documents read once, as a good user writes it.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --target FOLDER llama-cpp-python      # and FOLDER on PYTHONPATH

A batch reads the prefixes of several documents, each a sequence of its own; the next ones read a suffix of each, with
logits at the positions before query tokens only, after which the sequences end at their prefixes again. Prefixes are
kept as llama.cpp's own states of sequences. Token ids are ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import qpeft_ext as qpeft
from qpeft_ext.engine.rows import assemble_rows

SEQUENCES, CONTEXT, BATCH = 8, 512, 4096


def requantise(gguf: Path, made: Path, name: str) -> Path:
    """Write a GGUF file in another quantisation, for instance Q8_0, with llama.cpp's own tool. Returns: the file."""
    import llama_cpp

    if not made.is_file():
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), True
        part = made.with_suffix(".part")
        if code := llama_cpp.llama_model_quantize(str(gguf).encode(), str(part).encode(), ctypes.byref(how)):
            raise ValueError(f"llama.cpp could not write {gguf} as {name}: {code}")
        part.rename(made)
    return made


class LlamaCppScores:
    """Scores pairs with llama.cpp.

    Args:
        model: whose prompt is used; it must have no clues.
        gguf: the file.
        threads: of llama.cpp.
    """

    def __init__(self, model: qpeft.QPeftModel, gguf: Path, threads: int) -> None:
        import llama_cpp

        self.model, self.api = model, llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda level, text, user: None)  # kept, since C code calls it
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        self.lm = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_seq_max = SEQUENCES * CONTEXT, SEQUENCES
        given.n_batch = given.n_ubatch = BATCH
        given.n_threads = given.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.lm, given)
        if not self.lm or not self.context:
            raise ValueError(f"llama.cpp cannot load {gguf}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.lm))
        self.states: dict[tuple[int, ...], Any] = {}

    def score(self, texts: Sequence[tuple[str, Any]]) -> np.ndarray:
        """Return the log-likelihood of each query, [B]; documents that are not in `states` yet are read first."""
        batch = self.model.encode(texts)
        pairs_of: dict[int, list[int]] = {}
        for i, (_, d) in enumerate(batch.pairs):
            pairs_of.setdefault(d, []).append(i)
        scores = np.zeros(len(batch), dtype=np.float32)
        documents = sorted(pairs_of, key=lambda d: -len(batch.documents[d].ids))
        for start in range(0, len(documents), SEQUENCES):
            group = documents[start : start + SEQUENCES]
            prefixes = [batch.documents[d].ids for d in group]
            self._read(prefixes)
            for turn in range(max(len(pairs_of[d]) for d in group)):
                own = {place: pairs_of[d][turn] for place, d in enumerate(group) if turn < len(pairs_of[d])}
                scores[list(own.values())] = self._suffixes(batch, own, prefixes)
        return scores

    def _read(self, prefixes: Sequence[tuple[int, ...]]) -> None:
        """Put prefixes into the sequences 0, 1, …; those that were read before from their states."""
        api = self.api
        api.llama_memory_clear(self.memory, True)
        rows = []
        for place, prefix in enumerate(prefixes):
            if prefix in self.states:
                state = self.states[prefix]
                api.llama_state_seq_set_data(self.context, state, len(state), place)
            else:
                rows += [(token, at, place, False) for at, token in enumerate(prefix)]
        self._decode(rows)
        for place, prefix in enumerate(prefixes):
            if prefix not in self.states:
                size = api.llama_state_seq_get_size(self.context, place)
                state = (ctypes.c_uint8 * size)()
                api.llama_state_seq_get_data(self.context, state, size, place)
                self.states[prefix] = state

    def _suffixes(self, batch: Any, own: dict[int, int], prefixes: Sequence[tuple[int, ...]]) -> list[float]:
        """Score one pair in each of some sequences, ``own``: sequence -> pair."""
        part = batch.select(list(own.values()))
        rows = assemble_rows(part, self.model.prompt.suffix, [0] * len(part), self.model.device, with_prefix=False)
        L = rows.ids.shape[1]
        read, wanted = set(rows.read.slots.tolist()), []
        for i, place in enumerate(own):
            at = len(prefixes[place])
            for slot in range(L):
                if rows.mask[i, slot]:
                    wanted.append((int(rows.ids[i, slot]), at, place, i * L + slot in read))
                    at += 1
        logits = self._decode(wanted)
        top = logits.max(1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        targets = rows.target_ids.numpy()
        log_p = logits[np.arange(len(targets)), targets] - lse
        for place in own:
            self.api.llama_memory_seq_rm(self.memory, place, len(prefixes[place]), -1)
        pair_of = rows.read.slots.numpy() // L
        return [float(log_p[pair_of == i].sum()) for i in range(len(own))]

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> np.ndarray:
        """Read tokens: (id, position, sequence, whether logits are wanted). Returns: the logits, [wanted, V]."""
        if not rows:
            return np.zeros((0, self.words), dtype=np.float32)
        batch = self.batch
        for i, (token, at, place, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, at, 1
            batch.seq_id[i][0], batch.logits[i] = place, wanted
        batch.n_tokens = len(rows)
        if code := self.api.llama_decode(self.context, batch):
            raise ValueError(f"llama_decode returned {code}")
        count = sum(wanted for *_, wanted in rows)
        if not count:
            return np.zeros((0, self.words), dtype=np.float32)
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), shape=(count, self.words))
