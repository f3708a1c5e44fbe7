"""Pointwise yes/no reranking, the usual way to fine-tune an LM as a reranker: is the document relevant to the query?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..config import QPeftConfig
from ..engine.answers import Answer
from ..engine.rows import Rows
from ..model import QPeftModel
from ..prompts.pairs import PairBatch

ANSWERS = "yes", "no"


class YesNoModel(QPeftModel):
    """A model whose score of a pair is logit(yes) − logit(no) after ``Passage: … Question: {query}\\nRelevant:``.

    The document comes first here too, so that its prefix is shared and cached. The score takes the place of the query's
    log-likelihood, with one token, so that losses read it as it is; "listwise" with temperature 1 is the softmax
    cross-entropy over an example's documents.

    An adapter that it saves does not say that it answers yes or no: only this class can load it (`load_weights_into`).

    Args:
        lm, config, tokenizer: as for `QPeftModel`, with ``clues="none"``.

    Raises: ValueError if both answers begin with the same token, or for a template in which the query is an answer.
    """

    def __init__(self, lm, config: QPeftConfig, tokenizer) -> None:
        super().__init__(lm, config, tokenizer)

        if self.prompt.query_is_answer:
            raise ValueError(
                f"yes/no asks behind the query, which template={config.template!r} has as the answer; give this method "
                "options: {template: qpeft}"
            )

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.asked = tuple(ids("\nRelevant:"))
        yes, no = (ids(self.prompt.spaced(answer))[0] for answer in ANSWERS)
        if yes == no:
            raise ValueError(
                f"yes/no: the tokenizer begins {' and '.join(map(repr, ANSWERS))} with the same token; "
                "this method needs another LM"
            )
        self.answer = Answer((yes,), (no,))

    def _rows(self, batch: PairBatch, counts: Sequence[int], with_prefix: bool) -> Rows:
        return self.engine.assemble(batch, replace(self.prompt.suffix, asked=self.asked), counts, with_prefix)
