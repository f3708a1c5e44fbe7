"""The queue: what a pass takes, who comes first, who is never forgotten, and what is refused. No LM is needed."""

from itertools import count
from types import SimpleNamespace

import pytest

from qpeft_ext.serving.errors import RequestError
from qpeft_ext.serving.job import Job
from qpeft_ext.serving.speed import Speed
from qpeft_ext.serving.waiting import WaitingJobs

MODEL, OTHER = SimpleNamespace(whole=False), SimpleNamespace(whole=False)
NUMBERS = count()  # names of documents that no other request has
PREFIX, SUFFIX = 90, 10  # tokens of every document and of the rest of every prompt


def job(documents, name="", served=MODEL, names=None, suffix=SUFFIX):
    """A request with documents of its own, or with those given by name."""
    names = names or [f"{name or next(NUMBERS)}-{i}" for i in range(documents)]
    pairs = [("query", text) for text in names]
    digests = [text.encode() for text in names]
    return Job(served, pairs, digests, [PREFIX] * len(names), [suffix] * len(names))


def queue(*jobs, most=10**9):
    waiting = WaitingJobs(most, lambda job: None)
    for each in jobs:
        waiting.put(each)
    return waiting


def finish(chosen):
    """Do what the scoring thread does after a pass."""
    for each in chosen:
        if not each.pending:
            each.finish()


def passes_until(waiting, last, budget):
    """Take passes until a job is done; returns the tokens of each."""
    taken = []
    while not last.future.done():
        chosen = waiting.take(budget)
        taken.append(sum(len(places) for places in chosen.values()) * (PREFIX + SUFFIX))
        finish(chosen)
    return taken


def test_a_pass_takes_no_more_than_its_budget():
    waiting = queue(job(100, "a"), job(100, "b"))
    for _ in range(5):
        chosen = waiting.take(1000)
        assert sum(map(len, chosen.values())) == 10


def test_a_pass_has_a_pair_even_if_it_is_too_long():
    chosen = queue(job(3, "a")).take(1)
    assert sum(map(len, chosen.values())) == 1


def test_every_pair_is_taken_once_whatever_the_budget():
    jobs = [job(n, str(n)) for n in (1, 7, 40, 3)]
    waiting = queue(*jobs)
    taken = {each: [] for each in jobs}
    for budget in (100, 1000, 350, 10**6, 10**6, 10**6, 10**6):
        for each, places in waiting.take(budget).items():
            taken[each] += places
    assert {each: sorted(places) for each, places in taken.items()} == {e: list(range(len(e.pairs))) for e in jobs}
    assert waiting.take(1000) == {}
    assert waiting.tokens == 0


def test_a_short_request_waits_for_one_pass_of_about_its_own_size():
    long = [job(1000, f"long {i}") for i in range(4)]
    waiting = queue(*long)
    for _ in range(30):  # they have waited for long
        finish(waiting.take(10_000))
    short = job(5, "short")
    waiting.put(short)
    (tokens,) = passes_until(waiting, short, 10_000)
    assert tokens <= 3 * 5 * (PREFIX + SUFFIX)


def test_the_rest_of_a_request_does_not_make_passes_short():
    waiting = queue(job(20, "a"), job(20, "b"), job(20, "c"))
    sizes = [sum(map(len, waiting.take(1500).values())) for _ in range(4)]
    assert sizes == [15, 15, 15, 15]  # after the first pass five pairs of the first request are left


def test_requests_with_suffixes_as_long_share_a_pass_and_none_is_forgotten():
    first, longer, same = job(6, "a"), job(4, "b", suffix=30), job(6, "c")  # the second one is the shortest
    waiting = queue(first, longer, same, job(60, "d"))
    assert {each: len(places) for each, places in waiting.take(900).items()} == {first: 6, same: 3}
    first.finish()
    assert {each: len(places) for each, places in waiting.take(780).items()} == {longer: 4, same: 3}


def test_a_long_request_gets_half_of_the_time_however_many_short_ones_come():
    long = job(200, "long")
    waiting = queue(long)
    of_long = of_short = 0
    while long.pending:
        waiting.put(job(3))
        waiting.put(job(3))
        chosen = waiting.take(1000)
        of_long += len(chosen.get(long, []))
        of_short += sum(len(places) for each, places in chosen.items() if each is not long)
        finish(chosen)
    assert of_long == 200
    assert of_short <= 1.1 * of_long + 10


def test_a_request_for_another_model_gets_its_share_too():
    long = job(50, "long", OTHER)
    waiting = queue(long)
    passes = 0
    while long.pending:
        waiting.put(job(3))
        chosen = waiting.take(1000)
        assert len({each.group for each in chosen}) == 1
        finish(chosen)
        passes += 1
    assert passes <= 50  # 30 tokens of 1,000 are of short requests: about as many passes as for each of them alone


def test_pairs_over_the_documents_of_a_pass_join_it():
    first, second = job(0, names=["x", "y"]), job(0, names=["x", "y", "z"])
    chosen = queue(first, second).take(240)  # two documents and four suffixes
    assert {id(each): len(places) for each, places in chosen.items()} == {id(first): 2, id(second): 2}
    assert [second.pairs[place][1] for place in second.pending] == ["z"]


def test_what_is_in_the_cache_costs_its_suffix_only():
    known = job(30, "known")
    waiting = WaitingJobs(10**9, lambda each: setattr(each, "cached", [True] * len(each.pairs)))
    waiting.put(known)
    assert sum(map(len, waiting.take(200).values())) == 20


def test_short_documents_are_taken_with_short_ones():
    mixed = job(4, "m")
    mixed.prefix_tokens = [400, 10, 300, 20]
    mixed.__post_init__()
    (places,) = queue(mixed).take(60).values()
    assert places == [1, 3]


def test_scores_that_depend_on_the_whole_request_are_taken_whole():
    whole = job(20, "w", SimpleNamespace(whole=True))
    assert queue(whole).take(100) == {whole: list(range(20))}


def test_a_cancelled_request_is_dropped():
    first, second = job(50, "a"), job(2, "b")
    waiting = queue(first, second)
    waiting.take(100)
    first.future.cancel()
    second.future.cancel()
    assert waiting.take(10**6) == {}
    assert (len(waiting), waiting.tokens) == (0, 0)


def test_a_full_queue_refuses_and_says_for_how_long():
    waiting = queue(job(10), most=1500)
    with pytest.raises(RequestError, match="1000 tokens wait, this request has 1000, at most 1500") as caught:
        waiting.put(job(10), tokens_per_second=100.0)
    assert caught.value.kind == "overloaded"
    assert caught.value.retry_after == 10
    waiting.put(job(5))


def test_a_request_larger_than_the_queue_is_taken_when_it_is_alone():
    waiting = queue(most=10)
    waiting.put(job(3))
    with pytest.raises(RequestError, match="full"):
        waiting.put(job(1))


def test_a_closed_queue_refuses_and_keeps_what_it_has():
    waiting = queue(job(2))
    waiting.close()
    with pytest.raises(RequestError, match="shutting down"):
        waiting.put(job(1))
    assert not waiting.closed_and_empty
    finish(waiting.take(10**6))
    waiting.take(10**6)
    assert waiting.closed_and_empty


def test_the_budget_follows_the_speed_of_the_last_passes():
    speed = Speed(seconds=1.0, most=10_000, first=500.0)
    assert speed.budget == 400  # eight tenths of a second
    speed.measured(2000, 1.0)
    assert speed.budget == 1600
    for _ in range(300):
        speed.measured(300, 1.0)
    assert 239 <= speed.budget <= 241


def test_passes_become_longer_step_by_step():
    """After short passes of about one length, whose times say nothing about a token, the next is not far too long."""
    speed = Speed(seconds=1.0, most=10**6)
    for i in range(50):
        speed.measured(1000 + i % 2, 0.020 - 0.001 * (i % 2))
    assert speed.budget <= 4004
    for _ in range(4):
        tokens = speed.budget
        speed.measured(tokens, 0.010 + tokens / 60_000)
        assert 0.010 + tokens / 60_000 <= 1.0
    assert 0.75 <= 0.010 + speed.budget / 60_000 <= 0.85


def test_a_slow_machine_does_not_get_stuck_with_passes_of_one_pair():
    """A pass takes 4 s and 1 ms a token; passes of 1 s are impossible, short ones are a waste."""
    speed = Speed(seconds=1.0, most=100_000, first=50.0)
    for tokens in (50, 100):
        speed.measured(tokens, 4 + tokens / 1000)
    for _ in range(20):
        tokens = speed.budget
        speed.measured(tokens, 4 + tokens / 1000)
    assert 3500 <= speed.budget <= 4500
    assert Speed(1.0, 10).budget == 10
