"""What the official Q-PEFT code computes, one pair at a time and token by token: an oracle for `compat="official"`.

Written from a description of that code, with nothing of `qpeft_ext`: lists, loops, and the LM's own forward.
Left out are its faults that are random: they raise `Refused`.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

import torch
from torch import Tensor

BOS, EOS = 1, 2


class Refused(Exception):
    """The official code would draw at random here, or give NaN."""


@dataclass
class Official:
    """Mode 3 (retrieval) or 4 (attention).

    filters: of the letters d, q, s, a.  location: "suffix" or "prefix" of the hints.  cosine: or dot.
    weights: "table" [V, D], "w1", "b1", "w2", "b2" of the MLP; for mode 4 "in_weight", "in_bias", "out_weight",
        "out_bias" and ``heads``.
    """

    lm: torch.nn.Module
    tokenizer: object
    weights: dict[str, Tensor]
    mode: int
    k: int = 0
    heads: int = 0
    filters: str = "d"
    location: str = "suffix"
    cosine: bool = True
    limit: int = 300
    stop_words: frozenset = frozenset()
    soft_prompt: str = "given the hints, please generate a question for the input passage"

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def document_part(self, document: str) -> list[int]:
        """ "Passage: … Question: \\n"; a long one keeps its first piece and its tail."""
        ids = self.ids(f"Passage: {document} \n Question: \n")
        if len(ids) > self.limit:
            ids = [ids[0]] + ids[len(ids) - self.limit + 1 :]
        return ids

    def is_filtered(self, token: int, query: list[int], letters: str) -> bool:
        if token in (BOS, EOS):
            return True
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if "q" in letters and token in query:
            return True
        if "s" in letters and piece.replace("_", "") in self.stop_words:  # not the "▁" of SentencePiece
            return True
        return "a" in letters and not any(letter in string.ascii_letters for letter in piece)

    # -- mode 3 --------------------------------------------------------------------------------------------------

    def similarity(self, a: Tensor, b: Tensor) -> float:
        dot = float((a * b).sum())
        if self.cosine:
            lengths = float(a.norm()) * float(b.norm())
            dot = dot / lengths if lengths else 0.0
        return dot

    def hints(self, query: list[int], document: list[int]) -> list[int]:
        """The k tokens of mode 3: query and document are token ids, the latter with its template."""
        chosen = self.survivors(query, document)
        if len(chosen) < self.k:
            raise Refused("random tokens")
        return chosen[: self.k]

    def survivors(self, query: list[int], document: list[int]) -> list[int]:
        """All tokens that could be hints, best first."""
        sequence = [*document, BOS, *query, EOS]
        query_begins = max(i for i, token in enumerate(sequence) if token == BOS)
        frozen = self.lm.get_input_embeddings().weight
        scored = []
        for t, query_token in enumerate(query):
            for position, token in enumerate(sequence):
                score = 0.0  # a masked position keeps its place in the list
                if position < query_begins:
                    similarity = self.similarity(self.weights["table"][query_token], frozen[token])
                    score = float(torch.sigmoid(torch.tensor(round(similarity, 5), dtype=torch.float64)))
                scored.append((-score, t, position, token))
        best = sorted(scored)[:1000]
        for letters in (self.filters, ""):
            chosen: list[int] = []
            for *_, token in best:
                if self.is_filtered(token, query, letters) or ("d" in letters and token in chosen):
                    continue
                chosen.append(token)
            if chosen:
                break
        return chosen

    # -- mode 4 --------------------------------------------------------------------------------------------------

    def attended(self, query: list[int], document: list[int]) -> list[Tensor]:
        """A vector for each query token: multi-head attention, written out."""
        frozen = self.lm.get_input_embeddings().weight
        keys = [frozen[token] for token in document if not self.is_filtered(token, query, self.filters)]
        if not keys:
            raise Refused("NaN")
        D = frozen.shape[1]
        width = D // self.heads
        w, b = self.weights["in_weight"], self.weights["in_bias"]
        results = []
        for token in query:
            q = w[:D] @ self.weights["table"][token] + b[:D]
            heads = []
            for h in range(self.heads):
                span = slice(h * width, (h + 1) * width)
                logits, values = [], []
                for key in keys:
                    k = w[D : 2 * D] @ key + b[D : 2 * D]
                    v = w[2 * D :] @ key + b[2 * D :]
                    logits.append((q[span] * k[span]).sum() / width**0.5)
                    values.append(v[span])
                shares = torch.stack(logits).softmax(0)
                heads.append(sum(share * value for share, value in zip(shares, values, strict=True)))
            results.append(self.weights["out_weight"] @ torch.cat(heads) + self.weights["out_bias"])
        return results

    # -- the whole -----------------------------------------------------------------------------------------------

    def mlp(self, x: Tensor) -> Tensor:
        hidden = (self.weights["w1"] @ x + self.weights["b1"]).clamp_min(0)
        return self.weights["w2"] @ hidden + self.weights["b2"]

    def hint_vectors(self, query: list[int], document: list[int]) -> list[Tensor]:
        """ "hints: ", the hints, a newline: all through the MLP."""
        table = self.weights["table"]
        if self.mode == 3:
            inner = [table[token] for token in self.hints(query, document)]
        else:
            inner = self.attended(query, document)
        framed = [table[i] for i in self.ids("hints: ")] + inner + [table[i] for i in self.ids("\n")]
        return [self.mlp(vector) for vector in framed]

    def embeddings(self, query: str, document: str) -> tuple[list[Tensor], list[int]]:
        """The prompt as the LM gets it, and the tokens that are scored at its end."""
        part, question = self.document_part(document), self.ids(query)
        word = self.lm.get_input_embeddings().weight
        hints = self.hint_vectors(question, part) if self.mode else []
        before, behind = part, []
        if self.location == "suffix":
            before, behind = part[:-4], part[-4:]
        soft = [BOS, *self.ids(self.soft_prompt)]
        scored = [BOS, *question, EOS]
        words = [[word[i] for i in ids] for ids in (soft, before, behind, scored)]
        if self.location == "suffix":
            return [*words[0], *words[1], *hints, *words[2], *words[3]], scored
        return [*words[0], *hints, *words[1], *words[3]], scored

    def score(self, query: str, document: str) -> tuple[Tensor, Tensor]:
        """Mean and sum of log p over BOS, query and EOS; the mean leaves out tokens with log p = 0."""
        embeds, scored = self.embeddings(query, document)
        logits = self.lm(inputs_embeds=torch.stack(embeds)[None]).logits[0].float()
        log_p = []
        for i, token in enumerate(scored):
            log_p.append(logits[len(embeds) - len(scored) + i - 1].log_softmax(-1)[token])
        counted = [x for x in log_p if float(x) != 0]
        return sum(counted) / len(counted), sum(log_p)
