"""Small indexes of a tiny LM, and what they hold."""

from __future__ import annotations

from pathlib import Path

import torch
from families.tiny import tiny_lm, tiny_tokenizer
from safetensors import safe_open
from small_data import DOCUMENTS, QUERIES

import qpeft_ext as qpeft
from qpeft_ext.cli import main
from qpeft_ext.prefixes import index_writer as index_run
from qpeft_ext.prefixes.index import shard_paths
from qpeft_ext.prefixes.index_writer import IndexWriter


def model(lm=None, **options) -> qpeft.QPeftModel:
    return qpeft.get_qpeft_model(lm or tiny_lm("llama"), qpeft.QPeftConfig(clues="none", **options), tiny_tokenizer())


def corpus(documents=DOCUMENTS) -> dict[str, dict]:
    return {i: {"id": i, "title": title, "text": text} for i, (title, text) in documents.items()}


def make(folder: Path, of=None, documents=None, **options) -> index_run.Survey:
    """An index with a shard for every prefix or two, unless told otherwise."""
    with IndexWriter(of or model(), documents or corpus(), folder, **({"shard_bytes": 1} | options)) as writer:
        survey = writer.survey(show_progress_bar=False)
        writer.expect_room(survey)
        writer.run(survey, show_progress_bar=False)
    return survey


def contents(folder: Path) -> dict[str, torch.Tensor]:
    """Every prefix of an index by name, read with the safetensors library; none may be there twice."""
    found = {}
    for path in shard_paths(folder):
        with safe_open(path, "pt") as shard:
            assert not found.keys() & set(shard.keys())
            found |= {name: shard.get_tensor(name).clone() for name in shard.keys()}  # not the memory map
    return found


def scores(of, cache=None, **options):
    pairs = [(query, document) for query in QUERIES.values() for document in corpus().values()]
    return of.score(pairs, cache=cache, **options).query_log_likelihood


def command(capsys, *arguments) -> str:
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def error(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    return err
