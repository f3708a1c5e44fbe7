"""A Llama with random weights, and random prompts of given lengths: their values do not change what passes cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qpeft_ext as qpeft
from qpeft_ext.prompts.pairs import PairBatch
from qpeft_ext.prompts.pieces import DocumentPrefix


@dataclass(frozen=True)
class Shape:
    """An LM and the lengths of its prompts; the default is the 25 M Llama of the pages' tables."""

    layers: int = 6
    width: int = 512
    inner: int = 1536
    heads: int = 8
    groups: int = 1  # heads that share keys and values
    vocabulary: int = 8000
    document: int = 200  # tokens of title and text
    query: int = 16

    @property
    def prefix(self) -> int:
        return self.document + 12  # <bos>, the instruction, a newline

    @property
    def suffix(self) -> int:
        return 8 + 2 * self.query  # "hints:" and "Question:", a clue for each query token, the query


TINY = Shape(layers=2, width=64, inner=96, heads=4, vocabulary=300, document=38, query=4)


def make_model(shape: Shape, device, clues: str, dtype: torch.dtype, **options) -> qpeft.QPeftModel:
    """Make a Llama with random weights, and trained modules that have left the identity.

    ``options``: those of `QPeftConfig`.
    """
    torch.manual_seed(0)
    lm = LlamaForCausalLM(lm_config(shape, tie_word_embeddings=True, initializer_range=0.05)).to(device, dtype)
    config = qpeft.QPeftConfig(clues=clues, k=shape.query, num_heads=shape.heads, margin=0.5, **options)
    return off_the_identity(qpeft.get_qpeft_model(lm, config, make_tokenizer(shape.vocabulary)))


def off_the_identity(model: qpeft.QPeftModel) -> qpeft.QPeftModel:
    """Move the trained modules of a new model from the identity, where some gradients are 0; in place."""
    torch.manual_seed(1)
    for module in model.trained_modules.values():
        for parameter in module.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model.train()


def lm_config(shape: Shape, **options) -> LlamaConfig:
    """Describe a Llama of this shape; ``options``: others of `LlamaConfig`."""
    return LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // shape.groups,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        **options,
    )


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words w2, w3 and so on; the template's words are as many tokens as in Llama's."""
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    template = {"hints:": "w2 w3 w4", "\nQuestion:": "w5 w6 w7 w8 w9", "Question:": "w6 w7 w8 w9"}
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(*words) for words in template.items()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<s>")


class RandomIds:
    """Token ids of queries and documents, drawn one after the other."""

    def __init__(self, shape: Shape, seed: int = 2) -> None:
        self.shape, self.random = shape, torch.Generator().manual_seed(seed)

    def draw(self, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, self.shape.vocabulary, (length,), generator=self.random).tolist())

    def query(self) -> tuple[int, ...]:
        return self.draw(self.shape.query)

    def prefix(self) -> DocumentPrefix:
        """Return the prefix of a document: <bos>, ten tokens of instruction, its text, a newline."""
        ids = (0, *self.draw(10), *self.draw(self.shape.document), 9)
        return DocumentPrefix(ids, 11, 11 + self.shape.document, 0)


def make_batch(shape: Shape, queries: int, documents: int, seed: int = 2) -> PairBatch:
    """Make all pairs of some random queries and documents."""
    ids = RandomIds(shape, seed)
    pairs = [(q, d) for q in range(queries) for d in range(documents)]
    return PairBatch([ids.query() for _ in range(queries)], [ids.prefix() for _ in range(documents)], pairs)
