"""Rerankers that exist: the prompt that each was trained with, and the tokens that answer.

The words are those of the model cards. ``{{ cut }}`` stands where their code tokenises two texts separately.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KnownReranker:
    """A family of rerankers that ask a question and read an answer.

    Attributes:
        template: the prompt, in the language of Jinja2.
        options: of `QPeftConfig`, in which these rerankers have no choice.
        names: what the names of its models have in them, lower case; None where a name does not tell.
        model_types: of the LMs, by their configs.
        instruction: what stands for an instruction that nobody gives.
        max_tokens: at how many tokens the model card's code cuts a pair; None for no known limit.
    """

    template: str
    options: dict[str, Any] = field(default_factory=dict)
    names: re.Pattern[str] | None = None
    model_types: tuple[str, ...] = ()
    instruction: str = ""
    max_tokens: int | None = None


# https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
_QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n{{ cut }}'
    "<Instruct>: {{ instruction }}\n<Query>: {{ query }}\n<Document>: {{ document }}{{ cut }}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
# https://huggingface.co/mixedbread-ai/mxbai-rerank-base-v2, https://github.com/mixedbread-ai/mxbai-rerank
_MXBAI = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{{ cut }}{% if instruction %}instruction: {{ instruction }}\n{% endif %}query: {{ query }}"
    "{{ cut }}\n{{ cut }}document: {{ document }}{{ cut }}\n{{ cut }}You are a search relevance expert who evaluates "
    "how well documents match search queries. For each query-document pair, carefully analyze the semantic "
    "relationship between them, then provide your binary relevance judgment (0 for not relevant, 1 for relevant).\n"
    "Relevance:{{ cut }}<|im_end|>\n<|im_start|>assistant\n"
)
# https://huggingface.co/BAAI/bge-reranker-v2-gemma, https://github.com/FlagOpen/FlagEmbedding
_FLAG = (
    "A: {{ query }}{{ cut }}\n{{ cut }}B: {{ document }}{{ cut }}\n{{ cut }}Given a query A and a passage B, determine "
    "whether the passage contains an answer to the query by providing a prediction of either 'Yes' or 'No'."
)

PAIR = "pair"  # query and document as the tokenizer joins two texts, as sequence classifiers read them

RERANKERS: dict[str, KnownReranker] = {
    "qwen3_reranker": KnownReranker(
        _QWEN3,
        {"score": "yes_no", "yes_words": ("yes",), "no_words": ("no",), "exact_words": True},
        re.compile(r"qwen3-reranker"),
        ("qwen3",),
        "Given a web search query, retrieve relevant passages that answer the query",
        8192,
    ),
    "mxbai_rerank": KnownReranker(
        _MXBAI,
        {"score": "yes_no", "yes_words": ("1",), "no_words": ("0",), "exact_words": True},
        re.compile(r"mxbai-rerank-(base|large)-v2"),
        ("qwen2",),
        max_tokens=8192,
    ),
    "flag_reranker": KnownReranker(
        _FLAG,
        {"score": "yes_no", "yes_words": ("Yes",), "no_words": (), "exact_words": True, "special_tokens": "bos"},
        re.compile(r"bge-reranker-v2-gemma"),
        ("gemma",),
        max_tokens=1024,
    ),
    PAIR: KnownReranker("{{ query }}{{ cut }}{{ document }}"),
}


def known_reranker(name: str, model_type: str) -> str | None:
    """Find the reranker that an LM is by its name and type.

    Args:
        name: of the LM: a folder or a Hub id; its last part counts.
        model_type: of its config.
    Returns: a name of `RERANKERS`; None for an LM that is none of them, as far as one can tell.
    """
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    return next(
        (template for template, known in RERANKERS.items()
         if known.names is not None and known.names.search(last) and model_type in known.model_types), None
    )  # fmt: skip
