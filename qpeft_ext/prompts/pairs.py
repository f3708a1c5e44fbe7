"""Query–document pairs as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from .pieces import CluesFirstPieces, DocumentPrefix, SuffixPieces
from .prompt import Document, Prompt, document_text
from .worded import WordedPrompt

try:
    from .._host import pack_ragged
except ImportError:  # not built: QPEFT_REFERENCE=1

    def pack_ragged(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Pack lists of ids into CSR arrays: values [N], offsets [rows + 1], int64."""
        offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return np.fromiter((i for ids in lists for i in ids), dtype=np.int64, count=offsets[-1]), offsets


@dataclass
class PairBatch:
    """B query–document pairs over *distinct* queries and documents.

    queries: token ids of Q queries.
    documents: prefixes of N documents.
    pairs: B times (query index, document index).
    candidates: for each query the indices of the documents that it is ranked among (for ``source="candidates"``);
        None: the documents that it is paired with.
    cut_queries: the number of queries that were cut to ``max_query_tokens``.
    suffixes: for each query the fixed pieces around it, where queries have instructions; None: those of the prompt.
    query_prefixes: what stands before the documents of each query, where queries come first; None: documents do.
    """

    queries: list[tuple[int, ...]]
    documents: list[DocumentPrefix]
    pairs: list[tuple[int, int]]
    candidates: list[list[int]] | None = None
    cut_queries: int = 0
    suffixes: Sequence[SuffixPieces | CluesFirstPieces] | None = None
    query_prefixes: list[DocumentPrefix] | None = None

    @classmethod
    def from_text(
        cls,
        prompt: Prompt,
        pairs: Sequence[tuple[str, Document]],
        lists: Sequence[int] | None = None,
        truncate_queries: bool = False,
        instructions: Sequence[str | None] | None = None,
    ) -> PairBatch:
        """Tokenise each distinct query and document text once; the order of the pairs is kept.

        Args:
            prompt: makes the token ids.
            pairs: (query, document).
            lists: for each pair the list of candidates that it belongs to; a query in two lists counts as two queries.
            truncate_queries: whether queries longer than ``max_query_tokens`` are cut at their end; otherwise they are
                an error.
            instructions: for each pair the instruction of its query, or None; a query with two instructions counts as
                two queries.
        """
        queries: dict[tuple[str, int, str | None], int] = {}
        documents: dict[str, int] = {}
        kept: list[Document] = []
        index = []
        which_lists = repeat(0, len(pairs)) if lists is None else lists
        given = repeat(None, len(pairs)) if instructions is None else instructions
        for (query, document), which, instruction in zip(pairs, which_lists, given, strict=True):
            text = document_text(document)
            if text not in documents:
                documents[text] = len(documents)
                kept.append(document)
            index.append((queries.setdefault((query, which, instruction), len(queries)), documents[text]))
        candidates = paired_documents(index, len(queries))
        cut: list[int] | None = [] if truncate_queries else None
        query_ids = prompt.queries([query for query, _, _ in queries], cut)
        own = [instruction for _, _, instruction in queries]
        batch = cls(query_ids, prompt.documents(kept), index, candidates, len(cut or ()))
        if isinstance(prompt, WordedPrompt) and prompt.query_first:
            return replace(batch, query_prefixes=prompt.query_prefixes(query_ids, own))
        return replace(batch, suffixes=_suffixes(prompt, own))

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, pair_rows: Sequence[int]) -> PairBatch:
        """Make a batch of the same queries and documents with some of the pairs."""
        return replace(self, pairs=[self.pairs[i] for i in pair_rows], cut_queries=0)

    def in_reading_order(self) -> PairBatch:
        """Give the batch as passes read it: its documents are what is shared by several pairs, and read first.

        Where queries come first they are these documents, and the ids of documents are those of queries.
        """
        if self.query_prefixes is None:
            return self
        swapped = [(d, q) for q, d in self.pairs]
        return PairBatch([document.ids for document in self.documents], self.query_prefixes, swapped)

    def suffix_of(self, query: int, usual: SuffixPieces | CluesFirstPieces) -> SuffixPieces | CluesFirstPieces:
        """Give the pieces around a query: those of its instruction, or else ``usual``, those of the prompt."""
        return usual if self.suffixes is None else self.suffixes[query]

    def instruction_length(self, query: int) -> int:
        """Count the tokens before a query where queries have instructions; 0 where none has one."""
        return 0 if self.suffixes is None else self.suffixes[query].least_tokens


def _suffixes(prompt: Prompt, instructions: Sequence[str | None]) -> list[SuffixPieces | CluesFirstPieces] | None:
    """Make the pieces around each query; None where no query has an instruction."""
    pieces = {text: prompt.suffix if text is None else prompt.instructed(text) for text in dict.fromkeys(instructions)}
    return None if pieces.keys() <= {None} else [pieces[text] for text in instructions]


def paired_documents(pairs: Sequence[tuple[int, int]], num_queries: int) -> list[list[int]]:
    """List the distinct documents that each query is paired with, in order."""
    found: list[dict[int, None]] = [{} for _ in range(num_queries)]
    for query, document in pairs:
        found[query][document] = None
    return [list(documents) for documents in found]


def pad(rows: Sequence[Sequence[int]], device: torch.device | str, width: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad lists of ids with 0, to ``width`` at least: ids [B, L] int64 and mask [B, L] bool."""
    values, offsets = pack_ragged(rows)
    lengths = np.diff(offsets)
    mask = np.arange(lengths.max(initial=width)) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = values
    return to_device(ids, device), to_device(mask, device)


def to_device(array: np.ndarray, device: torch.device | str) -> Tensor:
    """Make a tensor of an array; it goes to a GPU through pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
