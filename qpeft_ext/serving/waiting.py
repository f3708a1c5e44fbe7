"""`WaitingJobs`: requests that wait to be scored, and which of their pairs the next pass scores."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

from .errors import RequestError
from .job import Job

Pass = dict[Job, list[int]]  # places of the pairs of each job


class WaitingJobs:
    """A queue that is bounded in tokens. Many threads put jobs into it, one takes passes from it.

    A pass is filled from the oldest job if it is about as short as any, else from the job with the fewest tokens left.
    What jobs get that came after the oldest one is then owed to the oldest, and paid with the next tokens. So a short
    request waits for the pass that is running and for one of at most three times the size of all that are about as
    short (or a sixteenth of the largest pass), and the oldest request gets half of the time or more, however many short
    ones come. Pairs over documents that a pass reads anyway join it.

    Args:
        max_tokens: of all jobs; one that is alone in the queue may have more.
        look_up: called with a job when it is first considered; marks what is in the cache (``Job.cached``).
    Attributes:
        tokens: of the jobs that are neither finished nor cancelled, about.
    """

    def __init__(self, max_tokens: int, look_up: Callable[[Job], object]) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        self._look_up = look_up
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._closed = False
        self._jobs: list[Job] = []  # the oldest first; of the taking thread only
        self._owed = 0

    def put(self, job: Job, tokens_per_second: float = 0.0) -> None:
        """Add a job.

        Args:
            tokens_per_second: by which the error tells how long to wait.
        Raises: RequestError if the queue is full, or closed.
        """
        with self._changed:
            if self._closed:
                raise RequestError("not_ready", "the server is shutting down; send the request to another one")
            if self.tokens and self.tokens + job.tokens > self.max_tokens:
                seconds = math.ceil(min(60.0, self.tokens / tokens_per_second)) if tokens_per_second else 1
                raise RequestError(
                    "overloaded",
                    f"the queue is full: {self.tokens} tokens wait, this request has {job.tokens}, at most "
                    f"{self.max_tokens} may wait; try again in {max(1, seconds)} s",
                    retry_after=max(1, seconds),
                )
            self.tokens += job.tokens
            self._arrived.append(job)
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        """Wait until there is a job, or for so long."""
        if not self._jobs:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._closed, seconds)

    def close(self) -> None:
        """Take no more jobs; those in the queue stay."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def closed_and_empty(self) -> bool:
        """Tell whether nothing is left and nothing can come."""
        with self._changed:
            return self._closed and not self._arrived and not self._jobs

    def __len__(self) -> int:
        """Jobs in the queue."""
        return len(self._arrived) + len(self._jobs)

    def take(self, budget: int) -> Pass:
        """Choose the pairs of the next pass, all of one model; they are no longer pending.

        Args:
            budget: tokens to compute; a pass has one pair at least.
        Returns: places of pairs, by job; {} if nothing waits.
        """
        self._admit()
        if not self._jobs:
            self._owed = 0
            return {}
        oldest, shortest = self._jobs[0], min(self._jobs, key=lambda job: job.left)
        if oldest.left <= 2 * shortest.size:
            shortest = oldest
        similar = [job.size for job in self._like(shortest) if job.left <= 2 * shortest.left]
        limit = min(budget, max(2 * sum(similar), budget // 16))
        if self._owed and oldest.group != shortest.group:
            chosen = _Choice(min(budget, self._owed))
            chosen.add(self._like(oldest))
            self._owed = max(0, self._owed - chosen.tokens)
        elif shortest is oldest:
            chosen = _Choice(limit)
            chosen.add(self._beside(oldest))
        else:
            chosen = _Choice(max(1, limit // 2))
            chosen.add(self._beside(shortest))
            first = chosen.tokens
            self._owed = min(self._owed + first - chosen.tokens_of(oldest), 8 * budget)
            if oldest.group == shortest.group:
                chosen.allow(min(limit, first + self._owed))
                chosen.add(self._like(oldest))
                self._owed = max(0, self._owed - (chosen.tokens - first))
        chosen.allow(min(budget, chosen.tokens * 3 // 2))
        chosen.add_read(self._like(next(iter(chosen.places))))
        return chosen.places

    def _like(self, first: Job) -> list[Job]:
        """List the jobs of one group, the oldest first."""
        return [job for job in self._jobs if job.group == first.group]

    def _beside(self, first: Job) -> list[Job]:
        """List the jobs of one group in the order in which a pass takes them after the first one.

        Those of about its size come first: those that have begun, then those with suffixes about as long, since a pass
        pads all to the longest. The others come by their size.
        """

        def order(job: Job) -> tuple[int, ...]:
            if job.left > 2 * first.size:
                return 2, job.left
            other = abs(job.suffix_tokens[0] - first.suffix_tokens[0])
            return job is not first, job.left == job.size, other, job.left

        return sorted(self._like(first), key=order)

    def _admit(self) -> None:
        """Take over the jobs that have arrived, and drop those that are done or cancelled."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
        for job in arrived:
            if not job.future.cancelled():
                self._look_up(job)
                job.size = job.left
        kept = []
        for job in (*self._jobs, *arrived):
            if job.pending and not job.future.done():
                kept.append(job)
            else:
                with self._changed:
                    self.tokens -= job.tokens
        self._jobs = kept

    def drop_all(self, error: Exception) -> None:
        """Fail every job that waits."""
        self._admit()
        for job in self._jobs:
            job.fail(error)
        self._admit()


class _Choice:
    """Pairs that are chosen for a pass.

    Args:
        budget: tokens to compute.
    """

    def __init__(self, budget: int) -> None:
        self.places: Pass = {}
        self.tokens = 0
        self._of: dict[Job, int] = {}
        self._budget = budget
        self._read: set[bytes] = set()

    def allow(self, budget: int) -> None:
        """Raise the budget."""
        self._budget = max(budget, self._budget)

    def tokens_of(self, job: Job) -> int:
        """Count the tokens of one job's pairs."""
        return self._of.get(job, 0)

    def add(self, jobs: Iterable[Job]) -> None:
        """Add pairs of these jobs, in their order, until the budget is spent."""
        for job in jobs:
            while job.pending:
                cost = job.left if job.whole else job.cost(job.pending[-1], self._read)
                if self.places and self.tokens + cost > self._budget:
                    return
                places = sorted(job.pending) if job.whole else [job.pending[-1]]
                del job.pending[-len(places) :]
                self._take(job, places, cost)

    def add_read(self, jobs: Iterable[Job]) -> None:
        """Add pairs whose documents are read anyway, as far as the budget allows."""
        for job in jobs:
            left = []
            for place in job.pending:
                cost = job.suffix_tokens[place]
                if job.whole or job.digests[place] not in self._read or self.tokens + cost > self._budget:
                    left.append(place)
                else:
                    self._take(job, [place], cost)
            job.pending = left

    def _take(self, job: Job, places: list[int], cost: int) -> None:
        self.places.setdefault(job, []).extend(places)
        self._read.update(job.digests[place] for place in places)
        self.tokens += cost
        self._of[job] = self._of.get(job, 0) + cost
