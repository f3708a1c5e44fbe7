"""The packaged base LM of the demo."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from qpeft_ext import QPeftConfig, QPeftModel, Reranker, get_qpeft_model, load_lm
from qpeft_ext.demo import harvest
from qpeft_ext.demo.adapters import ADAPTER
from qpeft_ext.lm.loading import BASE_LM

ROUTE = {"title": "maps.shortest_path", "text": "def shortest_path(graph, a, b):\n    return walk(graph, a)[b]"}
OTHERS = [
    {"title": "draw.plot_line", "text": "def plot_line(axis, x, y):\n    axis.draw(Line(x, y))"},
    {"title": "files.read_rows", "text": "def read_rows(path):\n    return list(open(path))"},
    {"title": "words.count_words", "text": "def count_words(text):\n    return Counter(text.split())"},
]


@pytest.fixture(scope="module")
def reranker():
    return Reranker(get_qpeft_model(load_lm(BASE_LM), QPeftConfig(clues="none", max_document_tokens=160)))


def test_it_is_small_and_says_where_it_comes_from():
    assert sum(path.stat().st_size for folder in (BASE_LM, ADAPTER) for path in folder.iterdir()) <= 8_000_000
    recipe = json.loads((BASE_LM / "recipe.json").read_text())
    assert not set(recipe["trained_on"]) & set(harvest.TEST_PACKAGES + harvest.DEV_PACKAGES)
    assert {"recipe", "dev", "versions", "licence", "minutes"} <= set(recipe)


@pytest.mark.parametrize("query", ["Compute the shortest path between two nodes", "The shortest path of a graph"])
def test_it_ranks_the_source_with_the_words_of_the_query_first(reranker, query):
    assert reranker.rank(query, [*OTHERS, ROUTE])[0]["corpus_id"] == len(OTHERS)


def test_names_and_words_are_the_same_tokens_with_exact_offsets():
    tokenizer = AutoTokenizer.from_pretrained(BASE_LM)
    ids = tokenizer("shortest path", add_special_tokens=False)["input_ids"]
    for text in ("shortest_path", "ShortestPath", " shortest\n   path"):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded["input_ids"] == ids
        pieces = [text[start:end].lower() for start, end in encoded["offset_mapping"]]
        assert "".join(pieces) == "shortestpath"


def test_any_text_has_ids():
    tokenizer = AutoTokenizer.from_pretrained(BASE_LM)
    ids = tokenizer("π ≈ 3.14, 漢字, \x00, 🙂", add_special_tokens=False)["input_ids"]
    assert ids and max(ids) < len(tokenizer) and tokenizer.unk_token_id is None


def test_weights_are_finite():
    lm = load_lm(BASE_LM)
    assert all(torch.isfinite(parameter).all() for parameter in lm.parameters())


def test_its_adapter_belongs_to_it_and_changes_scores(reranker):
    config = QPeftConfig.from_pretrained(ADAPTER)
    assert (config.clues, config.generated_lora_rank) == ("top_k", 16)
    assert config.base_model_name_or_path == BASE_LM.name  # no path of the machine that trained it
    adapted = Reranker(QPeftModel.from_pretrained(ADAPTER, load_lm(BASE_LM)))
    query = "Compute the shortest path between two nodes"
    assert adapted.rank(query, [*OTHERS, ROUTE])[0]["corpus_id"] == len(OTHERS)
    pairs = [(query, document) for document in OTHERS]
    assert abs(adapted.predict(pairs) - reranker.predict(pairs)).max() > 0.1
