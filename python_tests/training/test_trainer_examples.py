"""The documents that a query meets in training, and examples that are refused."""

from __future__ import annotations

import pytest
import transformers
from families.tiny import tiny_tokenizer
from training.tiny_training import EXAMPLES, Stream, assert_close, tiny_model, trainer, weights

import qpeft_ext as qpeft
from qpeft_ext.config import DISTILLATION
from qpeft_ext.prompts.prompt import Prompt
from qpeft_ext.training.collator import GroupCollator
from qpeft_ext.training.examples import drawn_member, lacking_negatives
from qpeft_ext.training.sampling import EpochOrder, StreamedTrainingExamples, TrainingExamples

pytestmark = pytest.mark.slow


def collate(examples, queries_per_group=4, in_batch=True, num_hard_negatives=1, epoch=0):
    members = [drawn_member(example, i, epoch, num_hard_negatives, seed=0) for i, example in enumerate(examples)]
    return GroupCollator(Prompt(tiny_tokenizer(), qpeft.QPeftConfig()), queries_per_group, in_batch)(members)


def test_a_group_is_scored_on_its_distinct_pairs():
    batch = collate(EXAMPLES[:4])
    assert len(batch["pairs"]) <= 32 and len(batch["pairs"].queries) == 4
    assert batch["positive"].sum(1).tolist() == [1] * 4
    # the columns of a query are the group's documents, each once
    for pair, mask in zip(batch["pair"], batch["mask"], strict=True):
        documents = [batch["pairs"].pairs[i][1] for i in pair[mask]]
        assert len(set(documents)) == len(documents) == int(mask.sum())
    alone = collate(EXAMPLES[:4], in_batch=False)
    assert alone["mask"].sum(1).tolist() == [2] * 4


def test_a_querys_candidates_are_its_own_documents():
    """What ``source="candidates"`` draws its clues from in training: not the documents of the group's other queries."""
    batch = collate(EXAMPLES[:4])["pairs"]
    assert [len(candidates) for candidates in batch.candidates] == [2] * 4
    for query, candidates in enumerate(batch.candidates):
        texts = [tiny_tokenizer().decode(batch.documents[d].document_ids).strip() for d in candidates]
        assert texts[0] == EXAMPLES[query]["positives"][0]["text"]
        assert texts[1] in [document["text"] for document in EXAMPLES[query]["negatives"]]
        assert sum(q == query for q, _ in batch.pairs) > 2  # the others are scored as well


def test_groups_share_nothing_but_the_computation():
    batch = collate(EXAMPLES[:8])
    assert batch["mask"].sum(1).max() <= 8 and len(batch["pairs"].documents) <= 16


@pytest.mark.parametrize(
    "other",
    [
        {"id": "p0", "text": "the same document by its id, in another edition"},
        {"text": "  TIDES by the   sea, tides"},
        "Tides by the sea, tides",
    ],
)
def test_a_relevant_document_is_never_a_negative(other):
    shared = dict(EXAMPLES[1], positives=[other], negatives=[])
    batch = collate([dict(EXAMPLES[0], negatives=[other]), shared])
    # neither as the first query's own negative nor as the second one's document; for the second one, which has
    # another text or no id, the first one's positive may be a negative
    assert int(batch["mask"][0].sum()) == 1


def test_a_query_that_occurs_twice_has_the_positives_of_both():
    twice = dict(EXAMPLES[0], query="ABOUT  tides?", query_id=None, positives=["another answer"], negatives=[])
    batch = collate([dict(EXAMPLES[0], negatives=[]), twice])
    assert batch["mask"].sum(1).tolist() == [1, 1]


def test_draws_depend_on_seed_epoch_and_example_alone():
    example = dict(EXAMPLES[0], negatives=[f"negative {i}" for i in range(50)])

    def drawn(epoch, seed=0, index=0):
        return [d.document for d in drawn_member(example, index, epoch, 3, seed).negatives]

    assert drawn(0) == drawn(0) and len(set(drawn(0))) == 3
    assert len({str(d) for d in (drawn(0), drawn(1), drawn(0, seed=1), drawn(0, index=1))}) == 4
    order = EpochOrder(50, seed=0)
    first = list(order)
    order.set_epoch(1)
    assert list(order) != first and sorted(i for _, i in first) == list(range(50)) and list(order)[0][0] == 1


def test_random_negatives_are_drawn_from_other_examples():
    examples = TrainingExamples(EXAMPLES, 1, 0, num_random_negatives=3)

    def drawn(index, epoch=0, of=examples):
        return [d.id for d in of[epoch, index].negatives]

    assert drawn(0) == drawn(0) and drawn(0) != drawn(0, epoch=1)
    for index in range(12):
        ids = drawn(index)
        assert len(ids) == 4 == len(set(ids)) and f"p{index}" not in ids
    assert len({id for index in range(12) for epoch in range(9) for id in drawn(index, epoch)}) == 48  # all there are
    few = TrainingExamples(EXAMPLES[:1], 3, 0, num_random_negatives=3)  # nothing left to draw
    assert len(drawn(0, of=few)) == 3
    with pytest.raises(ValueError, match="num_random_negatives=3 needs examples in a list"):
        StreamedTrainingExamples(EXAMPLES, 1, 0, num_random_negatives=3)


@pytest.mark.parametrize(
    "query_id, again",
    [
        ("q0", {"query_id": "q0", "query": "other words"}),
        (None, {"query": " ABOUT  tides?"}),
        ("q0", {"query": " ABOUT  tides?"}),
        ("q0", {"query_id": "another", "query": " ABOUT  tides?"}),
    ],
)
def test_positives_of_the_same_query_in_another_example_are_no_negatives(query_id, again):
    """One example per (query, positive): the other positive may be named as a negative, or be drawn at random."""
    other = again | {"positives": [{"id": "n0-0", "text": "also relevant"}], "negatives": []}
    first = dict(EXAMPLES[0], query_id=query_id)
    known = TrainingExamples([first, *EXAMPLES[1:], other], 3, 0, num_random_negatives=30)
    ids = {d.id for epoch in range(5) for d in known[epoch, 0].negatives}
    assert "n0-0" not in ids and {"n0-1", "n0-2", "p5"} <= ids
    assert "p0" not in {d.id for epoch in range(5) for d in known[epoch, 12].negatives}
    alone = TrainingExamples([first, *EXAMPLES[1:]], 3, 0)
    assert "n0-0" in {d.id for d in alone[0, 0].negatives}


@pytest.mark.parametrize("loss", DISTILLATION)
def test_teacher_scores_stay_with_their_documents(tmp_path, loss):
    examples = [
        dict(example, positive_scores=[10 + i], negative_scores=[i, i + 0.25, i + 0.5])
        for i, example in enumerate(EXAMPLES)
    ]
    batch = collate(examples[:4], in_batch=False, num_hard_negatives=2)
    for q in range(4):
        ids = [batch["pairs"].pairs[i][1] for i in batch["pair"][q]]
        texts = [tiny_tokenizer().decode(batch["pairs"].documents[d].document_ids).strip() for d in ids]
        given = [d["text"] for d in examples[q]["negatives"]]
        expected = [10 + q] + [examples[q]["negative_scores"][given.index(text)] for text in texts[1:]]
        assert batch["teacher_scores"][q].tolist() == expected
    model = tiny_model(loss=loss, in_batch_negatives=False)
    run = trainer(tmp_path, model, examples[:4], examples[:4], max_steps=30, learning_rate=2e-2)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.7 * before
    with pytest.raises(ValueError, match=f"example [0-3]: loss='{loss}' needs a teacher score for each document"):
        trainer(tmp_path, tiny_model(loss=loss, in_batch_negatives=False), EXAMPLES[:4]).train()


def test_streams_go_on_without_end():
    stream = iter(StreamedTrainingExamples(EXAMPLES[:3], 1, seed=0))
    members = [next(stream) for _ in range(7)]
    assert [m.index for m in members] == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="no training examples"):
        next(iter(StreamedTrainingExamples([], 1, seed=0)))


GOOD = EXAMPLES[0]
BAD = [
    ("a text", "expected a dict with query, positives and negatives, got str"),
    ({"query": "x", "negatives": ["y"]}, "expected a query and its documents: .* got the keys query, negatives"),
    (dict(GOOD, query="  "), "query must be a text that is not empty"),
    (dict(GOOD, query=3), "query must be a text"),
    (dict(GOOD, positives=[]), "positives is empty"),
    (dict(GOOD, positives="one document"), "positives must be a list of documents, got str"),
    (dict(GOOD, negatives=[{"title": "no text"}]), "negatives: a document must be"),
    (dict(GOOD, positives=[" "]), "a positive document has no text"),
    (dict(GOOD, negative_scores=[1.0]), r"negative_scores must be a finite number for each of the 3 neg.* got \[1.0"),
    (dict(GOOD, positive_scores=[float("nan")]), r"positive_scores must be a finite number .* got \[nan\]"),
]


@pytest.mark.parametrize("example, message", BAD)
def test_bad_examples_are_named(tmp_path, example, message):
    with pytest.raises(ValueError, match=f"^training example 2.*{message}"):
        trainer(tmp_path, examples=[GOOD, GOOD, example])
    with pytest.raises(ValueError, match=f"^evaluation example 1.*{message}"):
        trainer(tmp_path, dev=[GOOD, example])


class Rows:
    """Examples that are read by index, and not checked at once; any index gives one."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index % len(self)]


def test_what_to_do_where_negatives_are_missing_is_what_the_loss_allows():
    """A teacher has not scored the documents of other examples."""
    for loss, can in (("listwise", True), ("margin_mse", False)):
        config = qpeft.QPeftConfig(loss=loss, in_batch_negatives=False)
        said = lacking_negatives([EXAMPLES[0], {**EXAMPLES[1], "negatives": []}], config)
        assert said.startswith("1 of 2 training examples has no negatives")
        assert ("in_batch_negatives=True" in said) is can


def test_a_data_set_without_negatives_is_an_error(tmp_path):
    alone = [example | {"negatives": []} for example in EXAMPLES]
    for negatives, examples in ((1, alone), (0, EXAMPLES)):
        model = tiny_model(loss="listwise", in_batch_negatives=False, num_hard_negatives=negatives)
        with pytest.raises(ValueError, match="12 of 12 training examples have no negatives"):
            trainer(tmp_path, model, Rows(examples))


@pytest.mark.parametrize("kind", [Rows, Stream])
def test_queries_without_negatives_are_counted(tmp_path, caplog, monkeypatch, kind):
    examples = [EXAMPLES[0], *(example | {"negatives": []} for example in EXAMPLES[1:])]
    monkeypatch.setattr("training.tiny_training.EXAMPLES", examples)
    given = Stream() if kind is Stream else Rows(examples)
    model = tiny_model(loss="listwise", in_batch_negatives=False, temperature=1)
    run = trainer(tmp_path, model, given, max_steps=3)
    run.train()
    assert (run.counts.queries_alone, run.counts.queries_read) == (11, 12)
    assert "11 of the 12 queries read in training had no negatives, which loss='listwise' compares" in caplog.text
    caplog.clear()
    in_batch = trainer(tmp_path, tiny_model(loss="listwise", temperature=1), given, max_steps=3)
    in_batch.train()
    assert in_batch.counts.queries_alone == 0 and "no negatives" not in caplog.text


def test_a_query_too_long_is_named(tmp_path):
    examples = [dict(GOOD, query="long " * 50)] * 4
    with pytest.raises(ValueError, match="example [0-3]: query .* has 2.. tokens, max_query_tokens is 64"):
        trainer(tmp_path, examples=examples).train()


def test_queries_too_long_are_cut_on_request_and_counted(tmp_path, caplog):
    long, cut = "long " * 50, (" " + "long " * 50)[1:64]  # a byte is a token, and a space goes before a query
    parameters = []
    for query in (long, cut):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=4, save_strategy="no", use_cpu=True
        )
        ours = qpeft.QPeftTrainer(tiny_model(), args, [dict(GOOD, query=query)] * 4, truncate_queries=True)
        ours.train()
        parameters.append(weights(ours.model))
        assert ours.counts.queries_cut == (query is long)  # the same query four times is read once
    assert_close(*parameters, 0)
    assert "1 query read in training was cut to max_query_tokens=64" in caplog.text
