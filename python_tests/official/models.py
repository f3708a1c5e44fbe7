"""Tiny models with ``compat="official"``, the texts that their tests read, and the restatement of each."""

from __future__ import annotations

import torch
from families.tiny_llama import tiny_llama, tiny_llama_tokenizer
from official.restatement import Official

import qpeft_ext as qpeft
from qpeft_ext.utils.optional import import_bm25s

QUERIES = ["why is the tide high?", "boats", "the moon"]
DOCUMENTS = [
    "the tide is the sea that the moon pulls, 2 times a day",
    {"title": "Boat", "text": "boats bathe in the sea; über 潮, a_b_c the harbour holds them all, more than 3 of them"},
    "dull words, no such thing about any of it",
]
PAIRS = [(QUERIES[q], DOCUMENTS[d]) for q, d in [(0, 0), (1, 1), (0, 1), (2, 0), (2, 2), (1, 2)]]
LETTERS = {"q": "query_tokens", "s": "stop_words", "a": "non_alphabetic"}


def text_of(document) -> str:
    return document if isinstance(document, str) else f"{document['title']} {document['text']}"


def official_model(clues: str = "top_k", moved: bool = True, **options) -> qpeft.QPeftModel:
    config = qpeft.QPeftConfig(**{"clues": clues, "compat": "official", "k": 5, "num_heads": 2} | options)
    model = qpeft.get_qpeft_model(tiny_llama(), config, tiny_llama_tokenizer())
    torch.manual_seed(1)
    for parameter in model.clues.parameters() if moved and model.clues else ():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def restated(model: qpeft.QPeftModel) -> Official:
    """The restatement with the parameters of a model."""
    config, weights = model.qpeft_config, {}
    if model.clues is not None:
        p = dict(model.clues.named_parameters())
        weights = {
            "table": p["embeddings.weight"],
            "w1": p["mlp.0.weight"],
            "b1": p["mlp.0.bias"],
            "w2": p["mlp.2.weight"],
            "b2": p["mlp.2.bias"],
        }
    if config.clues == "attention":
        weights |= {
            "in_weight": p["attention.in_proj_weight"],
            "in_bias": p["attention.in_proj_bias"],
            "out_weight": p["attention.out_proj.weight"],
            "out_bias": p["attention.out_proj.bias"],
        }
    return Official(
        model.lm, model.tokenizer, weights, {"none": 0, "top_k": 3, "attention": 4}[config.clues], config.k,
        config.num_heads, "d" + "".join(letter for letter, name in LETTERS.items() if name in config.filters),
        {"document_first": "suffix", "clues_first": "prefix"}[config.layout], config.similarity == "cosine",
        config.max_document_tokens, frozenset(import_bm25s("bm25s.stopwords").STOPWORDS_EN_PLUS),
        config.instruction)  # fmt: skip


def clue_ids(model, query: str, document) -> list[int]:
    ids = model.compute_clues(model.encode([(query, document)]), explain=True).explanation["clue_ids"][0]
    assert ids[: len(model.clues.hints)].eq(-1).all() and ids[-len(model.clues.newline) :].eq(-1).all()
    return ids[ids >= 0].tolist()


def expected_ids(model, query: str, document) -> list[int]:
    oracle = restated(model)
    return oracle.hints(oracle.ids(query), oracle.document_part(text_of(document)))
