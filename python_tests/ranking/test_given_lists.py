"""What users hand to the public functions: any kind of list, and a clear line for what is none."""

import copy
import pickle

import numpy as np
import pytest
import torch
from families.tiny import DOCUMENTS, PAIRS, QUERIES, tiny_lm, tiny_tokenizer

import qpeft_ext as qpeft
from qpeft_ext.ops._library import REFERENCE
from qpeft_ext.utils.inputs import as_list

pytestmark = pytest.mark.slow


TEXTS = ["tides rise", "a long passage about harbours", "the moon", "boats on the sea"]


@pytest.fixture(scope="module")
def reranker():
    config = qpeft.QPeftConfig(clues="top_k", k=3, rank=8)
    return qpeft.Reranker(qpeft.get_qpeft_model(tiny_lm("llama"), config, tiny_tokenizer()), deterministic=True)


class Series:
    """Indexed by labels, iterated in its order: as a pandas Series is after sorting or filtering."""

    def __init__(self, values, labels):
        self.values, self.labels = values, labels

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, label):
        return self.values[self.labels.index(label)]


LISTS = {
    "Series in another order": lambda items: Series(items, [2, 0, 3, 1]),
    "Series of other labels": lambda items: Series(items, [7, 9, 11, 13]),
    "generator": lambda items: (item for item in items),
    "tuple": tuple,
    "iterator": iter,
    "array of str": np.array,
    "array of objects": lambda items: np.array(items, dtype=object),
    "values of a dict": lambda items: dict(enumerate(items)).values(),
    "keys of a dict": lambda items: dict.fromkeys(items).keys(),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_any_kind_are_read_in_their_order(reranker, kind):
    given = LISTS[kind]
    expected = reranker.rank(QUERIES[0], TEXTS, return_documents=True)
    assert [row["text"] for row in expected] == [TEXTS[row["corpus_id"]] for row in expected]
    assert reranker.rank(QUERIES[0], given(TEXTS), return_documents=True) == expected
    other = reranker.rank(QUERIES[1], TEXTS)
    many = reranker.rank_many(given(QUERIES), (given(TEXTS) for _ in QUERIES))
    assert many == [[{key: row[key] for key in ("corpus_id", "score")} for row in expected], other]
    assert reranker.similarity(given(QUERIES), (given(TEXTS) for _ in QUERIES)) == reranker.similarity(
        QUERIES, [TEXTS, TEXTS]
    )


def test_pandas_series(reranker):
    pandas = pytest.importorskip("pandas")
    texts = pandas.Series(TEXTS).sort_values(ascending=False)
    for row in reranker.rank(QUERIES[0], texts, return_documents=True):
        assert row["text"] == texts.iloc[row["corpus_id"]]
        assert row["score"] == reranker.predict((QUERIES[0], row["text"]))
    table = pandas.DataFrame({"text": TEXTS})
    with pytest.raises(TypeError, match=r"table \(DataFrame\); give one column"):
        reranker.rank(QUERIES[0], table)


def test_pairs_of_any_kind(reranker):
    pairs = [(QUERIES[i % 2], text) for i, text in enumerate(TEXTS)]
    expected = reranker.predict(pairs)
    queries, texts = zip(*pairs, strict=True)
    for given in (
        zip(queries, texts, strict=True),
        iter(pairs),
        np.array(pairs),
        [list(pair) for pair in pairs],
        np.array(pairs, dtype=object),
        {i: pair for i, pair in enumerate(pairs)}.values(),
    ):
        assert reranker.predict(given).tolist() == expected.tolist()
    for pair in (pairs[0], list(pairs[0]), np.array(pairs[0]), [QUERIES[0], {"text": TEXTS[0]}]):
        assert reranker.predict(pair) == expected[0] and isinstance(reranker.predict(pair), float)
    assert reranker.predict(pairs[:2]).shape == (2,) and reranker.predict([]).shape == (0,)
    assert reranker.predict([pairs[0]]).shape == (1,)


WRONG = {
    "a text for documents": (
        lambda r: r.rank("q", "one text"),
        TypeError,
        "rank: documents must be a list, got the string 'one text'; one document goes into a",
    ),
    "a dict for documents": (lambda r: r.rank("q", {"id": "d1", "text": "sea"}), TypeError, "a dict with the keys id"),
    "None for documents": (lambda r: r.rank("q", None), TypeError, "rank: documents must be a list, got None"),
    "a set of documents": (lambda r: r.rank("q", {"a", "b"}), TypeError, "no order"),
    "a number for documents": (lambda r: r.rank("q", np.array(3)), TypeError, "rank: documents must be a list, got nd"),
    "many queries for one": (lambda r: r.rank(["q"], ["d"]), TypeError, "rank_many ranks for many queries"),
    "a text for queries": (lambda r: r.rank_many("abc", [["d"]] * 3), TypeError, "queries must be a list, got the str"),
    "a text for candidates": (lambda r: r.rank_many(["a", "b"], "dd"), TypeError, "candidates must be a list, got"),
    "texts for candidates": (lambda r: r.rank_many(["a", "b"], ["d", "e"]), TypeError, "the candidates of query 0 mu"),
    "queries by id": (lambda r: r.rank_many({"q1": "a"}, [["d"]]), TypeError, "dict with the keys q1"),
    "too few lists": (lambda r: r.similarity(["a", "b"], [["d"]]), ValueError, "2 queries but 1 list of candidates"),
    "a text for pairs": (lambda r: r.predict("ab"), TypeError, "predict: pairs must be a list, got the string 'ab'"),
    "texts for pairs": (lambda r: r.predict(["ab", "cd", "ef"]), TypeError, "but pair 0 is the string 'ab'"),
    "a dict for pairs": (lambda r: r.predict({"a": "b"}), TypeError, "dict with the keys a"),
    "a pair as a dict": (lambda r: r.predict([{"query": "a", "text": "b"}]), TypeError, "pair 0 is a dict with the"),
    "a pair of three": (lambda r: r.predict([("a", "b"), ("a", "b", 1.0)]), ValueError, "but pair 1 has 3 items"),
    "bytes": (
        lambda r: r.rank("q", ["d", b"d"]),
        TypeError,
        "document 1 must be a string or a dict with a string 'text', got bytes b'd'; decode it",
    ),
    "NaN": (
        lambda r: r.rank_many(["q", "r"], [["d"], ["d", float("nan")]]),
        TypeError,
        "document 1 of query 1 must be a string or a dict with a string 'text', got nan (a missing value?)",
    ),
    "other keys": (lambda r: r.rank("q", [{"id": 1, "contents": "d"}]), TypeError, "a dict with the keys id, contents"),
    "a text that is None": (lambda r: r.rank("q", [{"text": None}]), TypeError, "a dict whose 'text' is None"),
    "a title that is NaN": (
        lambda r: r.rank("q", [{"text": "d", "title": float("nan")}]),
        TypeError,
        "the title of document 0 must be a string, got nan",
    ),
    "half a surrogate pair": (
        lambda r: r.rank("q", ["a", "b", "sea \ud800"]),
        ValueError,
        r"document 2 has half a surrogate pair, '\ud800', at character 4",
    ),
    "half of one in a query": (lambda r: r.rank_many(["q", "\udc80"], [["a"], ["b"]]), ValueError, "query 1 has half"),
    "half of one in a pair": (
        lambda r: r.predict([("q", "a"), ("q", {"title": "\ud800", "text": "d"})]),
        ValueError,
        "the document of pair 1 has half a surrogate pair",
    ),
    "half of one to explain": (lambda r: r.explain("q", "\ud800"), ValueError, "explain: the document has half"),
    "an empty query": (lambda r: r.rank_many(["q", " "], [["d"]] * 2), ValueError, "query 1 must have at least one"),
    "top_k as a float": (lambda r: r.rank("q", ["d"], top_k=1.0), TypeError, "top_k must be a whole number, got 1.0"),
    "top_k as a bool": (lambda r: r.rank("q", ["d"], top_k=True), TypeError, "top_k must be a whole number, got bool"),
    "top_k below 1": (lambda r: r.rank("q", ["d"], top_k=-1), ValueError, "top_k must be at least 1, got -1"),
    "batch_size 0": (lambda r: r.predict([("q", "d")], batch_size=0), ValueError, "batch_size must be at least 1"),
    "an activation": (lambda r: r.predict([("q", "d")], activation_fn=torch.nn.Sigmoid()), ValueError, "activation_fn"),
    "a softmax": (lambda r: r.rank("q", ["d"], apply_softmax=True), ValueError, "leave apply_softmax out"),
    "pairs to encode": (lambda r: r.model.score(["q", "d"]), TypeError, "encode takes (query, document) pairs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_list_or_no_text_is_an_error_that_names_its_place(reranker, name):
    call, kind, words = WRONG[name]
    with pytest.raises(kind) as caught:
        call(reranker)
    message = str(caught.value)
    assert words in message and "\n" not in message and len(message) <= 300


def test_a_list_is_copied_and_numbers_of_numpy_are_numbers(reranker):
    given = ["a"]
    assert as_list(given, "", "") == given and as_list(given, "", "") is not given
    assert len(reranker.rank("q", TEXTS, top_k=np.int64(2))) == 2


def test_words_of_cross_encoders(reranker, monkeypatch):
    expected = reranker.predict(PAIRS)
    tensor = reranker.predict(PAIRS, 32, False, convert_to_tensor=True, activation_fn=torch.nn.Identity())
    assert isinstance(tensor, torch.Tensor) and tensor.tolist() == expected.tolist()
    assert [float(x) for x in reranker.predict(PAIRS, convert_to_numpy=False)] == expected.tolist()
    assert float(reranker.predict(PAIRS[0], convert_to_tensor=True)) == expected[0]
    sizes, group = [], type(reranker.model)._score_group
    monkeypatch.setattr(
        type(reranker.model),
        "_score_group",
        lambda self, batch, *rest: (sizes.append(len(batch)), group(self, batch, *rest))[1],
    )
    in_batches = qpeft.Reranker(reranker.model)
    np.testing.assert_allclose(in_batches.predict(PAIRS, batch_size=2), expected, atol=1e-4)
    assert max(sizes) == 2
    ranked = in_batches.rank(QUERIES[0], DOCUMENTS, batch_size=1, num_workers=0, convert_to_tensor=True)
    assert max(sizes[-len(DOCUMENTS) :]) == 1
    assert [row["corpus_id"] for row in ranked] == [row["corpus_id"] for row in reranker.rank(QUERIES[0], DOCUMENTS)]


KINDS = {
    "attention": ("llama", dict(clues="attention", num_heads=4, rank=8)),
    "candidates": ("llama", dict(clues="top_k", k=3, rank=8, score_gate=True, source="candidates")),
    "vocabulary": ("llama", dict(clues="top_k", k=3, rank=8, source="vocabulary")),
    "generated LoRA": ("llama", dict(clues="top_k", k=3, rank=8, generated_lora_rank=2)),
    "soft prompt": ("gpt2", dict(clues="none", num_virtual_tokens=3)),
    "encoder-decoder": ("t5", dict(clues="top_k", k=3, rank=8)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_gives_the_same_scores_before_and_after_use(kind, copied):
    family, options = KINDS[kind]
    model = qpeft.get_qpeft_model(tiny_lm(family), qpeft.QPeftConfig(**options), tiny_tokenizer())
    reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(1 << 20, host_bytes=1 << 18))

    def scores(of):
        return [row["score"] for rows in of.rank_many(QUERIES, [TEXTS, TEXTS[::-1]]) for row in rows]

    unused = copied(reranker)
    expected = scores(reranker)
    assert scores(unused) == expected
    assert scores(copied(unused)) == expected
    assert scores(reranker) == pytest.approx(expected, abs=1e-4)  # from its cache
    used = copied(reranker)
    assert len(used.cache) == 0 and used.cache.max_bytes == 1 << 20 and set(used.cache.tiers) == {"device", "host"}
    assert scores(used) == expected
    # both are known by addresses of this process
    assert (used.projected.used_bytes > 0) == (kind == "attention" and not REFERENCE)
    assert copied(reranker).projected.used_bytes == 0
    assert getattr(copied(reranker.model).clues, "_inverse_norms", None) is None


def test_rerankers_of_one_model_have_their_own_projected_rows():
    options = dict(clues="attention", num_heads=4, rank=8)
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(**options), tiny_tokenizer())
    first = qpeft.Reranker(model, projected_bytes=1 << 20)
    expected, used = first.predict(PAIRS), first.projected.used_bytes
    second = qpeft.Reranker(model, projected_bytes=0)
    np.testing.assert_allclose(second.predict(PAIRS), expected, atol=1e-4)
    assert second.projected.used_bytes == 0 and first.projected.used_bytes == used and first.projected.max_bytes
    assert (used > 0) != REFERENCE
    np.testing.assert_array_equal(first.predict(PAIRS), expected)


def test_a_copied_cache_opens_its_files_again(tmp_path, caplog):
    model = qpeft.get_qpeft_model(tiny_lm("llama"), qpeft.QPeftConfig(clues="none"), tiny_tokenizer())
    reranker = qpeft.Reranker(model, cache=qpeft.DocumentCache(0, disk=tmp_path / "disk", disk_bytes=1 << 20))
    expected = reranker.predict(PAIRS)
    pickled = pickle.dumps(reranker)
    beside = pickle.loads(pickled)
    assert set(beside.cache.tiers) == {"device"} and "does without its disk tier" in caplog.text
    np.testing.assert_array_equal(beside.predict(PAIRS), expected)
    del reranker, beside
    again = pickle.loads(pickled)
    np.testing.assert_allclose(again.predict(PAIRS), expected, atol=1e-5)
    assert again.cache.tiers["disk"].hits > 0
