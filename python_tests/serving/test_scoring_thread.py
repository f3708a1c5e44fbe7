"""The scoring thread when something fails: memory, one request among others, the thread itself. No LM is needed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qpeft_ext.serving.errors import RequestError
from qpeft_ext.serving.job import Job
from qpeft_ext.serving.scoring_thread import ScoringThread
from qpeft_ext.serving.settings import Limits

SECONDS = 60


class Reranker:
    """Scores a document by its number; `fault` may raise what a real one would."""

    deterministic = False
    cache = None
    max_tokens_per_batch = 4096
    model = SimpleNamespace(engine=SimpleNamespace(why_not_cached="there is no LM", is_encoder_decoder=False))

    def __init__(self, fault=lambda pairs: None):
        self.fault = fault
        self.calls = []

    def score(self, pairs, lists=None, instructions=None):
        self.calls.append(len(pairs))
        self.fault(pairs)
        return np.array([float(document) for _, document in pairs], dtype=np.float32)


class Cache(list):
    """What a cache holds, in the way that the thread uses it."""

    kv_dtype = None

    def held(self, keys):
        return [False] * len(keys)


class Observer:
    passes = memory = 0

    def passed(self, jobs, pairs, computed, cached, seconds):
        self.passes += 1

    def out_of_memory(self):
        self.memory += 1


def job(reranker, *documents):
    pairs = [("query", str(document)) for document in documents]
    served = SimpleNamespace(whole=False, reranker=reranker)
    return Job(served, pairs, [d.encode() for _, d in pairs], [10] * len(pairs), [5] * len(pairs))


@pytest.fixture
def thread():
    """A thread that is ended after the test; `start` starts it with these jobs waiting."""
    made = ScoringThread(Limits(max_pass_tokens=10**6), Observer())
    made.speed.measured(10**6, 1.0)

    def start(*jobs):
        for each in jobs:
            made.waiting.put(each)
        made.start()
        return jobs

    yield SimpleNamespace(it=made, start=start)
    made.waiting.close()
    made.join(SECONDS)
    assert not made.is_alive()


def same_served(*jobs):
    """Let jobs share a model, so that they share passes."""
    for each in jobs[1:]:
        each.served = jobs[0].served
    return jobs


def test_requests_that_wait_share_a_pass(thread):
    reranker = Reranker()
    jobs = thread.start(*same_served(job(reranker, 1, 2), job(reranker, 3), job(reranker, 4, 5, 6)))
    assert [each.future.result(SECONDS).scores.tolist() for each in jobs] == [[1, 2], [3], [4, 5, 6]]
    assert len(reranker.calls) < 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_until_it_fits(thread, error):
    def fault(pairs):
        if len(pairs) > 2:
            raise error

    reranker = Reranker(fault)
    (one,) = thread.start(job(reranker, *range(8)))
    assert one.future.result(SECONDS).scores.tolist() == list(range(8))
    assert reranker.calls == [8, 4, 2, 2, 4, 2, 2]
    assert thread.it.healthy
    assert thread.it._observer.memory == 3


def test_a_kernel_that_onednn_refuses_is_done_without(thread):
    def fault(pairs):
        if torch._C._get_mkldnn_enabled():
            raise RuntimeError("could not create a primitive")

    reranker = Reranker(fault)
    (one,) = thread.start(job(reranker, *range(8)))
    assert one.future.result(SECONDS).scores.tolist() == list(range(8))
    assert reranker.calls == [8, 8] and thread.it._observer.memory == 0
    assert torch._C._get_mkldnn_enabled()


def test_a_pair_that_never_fits_turns_the_server_red_until_one_does(thread):
    def fault(pairs):
        if any(document == "13" for _, document in pairs):
            raise torch.OutOfMemoryError

    reranker = Reranker(fault)
    bad, good = thread.start(*same_served(job(reranker, 13), job(reranker, 1)))
    with pytest.raises(RequestError, match="out of memory") as caught:
        bad.future.result(SECONDS)
    assert (caught.value.kind, caught.value.retry_after) == ("not_ready", 5)
    assert good.future.result(SECONDS).scores.tolist() == [1]
    again = job(reranker, 2)
    thread.it.put(again)
    again.future.result(SECONDS)
    assert thread.it.healthy


@pytest.mark.parametrize("fits", [True, False])
def test_passes_are_as_large_as_before_after_a_pair_that_did_not_fit(thread, fits):
    """A real reranker halves its passes for good before it says that memory is short."""

    def fault(pairs):
        if any(document == "13" for _, document in pairs) and (len(pairs) > 1 or not fits):
            reranker.max_tokens_per_batch = 1
            raise torch.OutOfMemoryError

    reranker = Reranker(fault)
    (one,) = thread.start(job(reranker, 13, 2))
    if fits:
        assert one.future.result(SECONDS).scores.tolist() == [13, 2]
    else:
        with pytest.raises(RequestError, match="out of memory"):
            one.future.result(SECONDS)
    thread.it.put(job(reranker, 3))
    thread.it.waiting.close()
    thread.it.join(SECONDS)
    assert reranker.max_tokens_per_batch == 4096


def whole_job(reranker, *documents):
    """A job whose documents are scored in one call."""
    made = job(reranker, *documents)
    made.served.whole, made.lists = True, [0] * len(documents)
    return made


def test_documents_scored_as_a_whole_get_the_memory_of_the_cache(thread):
    def fault(pairs):
        if reranker.cache:
            raise torch.OutOfMemoryError

    reranker = Reranker(fault)
    reranker.cache = Cache([1, 2, 3])
    (one,) = thread.start(whole_job(reranker, 7, 8, 9))
    assert one.future.result(SECONDS).scores.tolist() == [7, 8, 9]
    assert reranker.calls == [3, 3] and thread.it._observer.memory == 1 and thread.it.healthy


def test_documents_scored_as_a_whole_do_without_a_kernel_that_onednn_refuses(thread):
    def fault(pairs):
        if torch._C._get_mkldnn_enabled():
            raise RuntimeError("could not create a primitive")

    reranker = Reranker(fault)
    (one,) = thread.start(whole_job(reranker, 7, 8))
    assert one.future.result(SECONDS).scores.tolist() == [7, 8]
    assert reranker.calls == [2, 2] and thread.it._observer.memory == 0


def test_a_request_that_fails_does_not_fail_others(thread):
    def fault(pairs):
        if any(document == "13" for _, document in pairs):
            raise ValueError("the secret text of a document")

    reranker = Reranker(fault)
    good, bad, other = thread.start(*same_served(job(reranker, 1, 2), job(reranker, 13), job(reranker, 3)))
    assert good.future.result(SECONDS).scores.tolist() == [1, 2]
    assert other.future.result(SECONDS).scores.tolist() == [3]
    with pytest.raises(RequestError) as caught:
        bad.future.result(SECONDS)
    assert caught.value.kind == "backend"
    assert "secret" not in str(caught.value)


def test_who_waits_is_told_when_the_thread_ends():
    def end():
        raise KeyError("a defect")

    thread = ScoringThread(Limits(), Observer(), between=end)
    waits = job(Reranker(), 1)
    thread.waiting.put(waits)
    thread.start()
    with pytest.raises(RequestError, match="has ended"):
        waits.future.result(SECONDS)
    thread.join(SECONDS)
    with pytest.raises(RequestError, match="has ended"):
        thread.put(job(Reranker(), 1))


def test_what_waits_is_scored_before_the_thread_ends():
    thread, reranker = ScoringThread(Limits(), Observer()), Reranker()
    jobs = [job(reranker, i) for i in range(20)]
    for each in jobs:
        thread.waiting.put(each)
    thread.waiting.close()
    thread.start()
    thread.join(SECONDS)
    assert [each.future.result(0).scores.tolist() for each in jobs] == [[i] for i in range(20)]
