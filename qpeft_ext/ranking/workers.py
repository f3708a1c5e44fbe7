"""One process per device: each loads the models, ranks blocks, and ends with the process that started it."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.context
import os
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from threading import RLock

from .run import Block, RankedBlock
from .systems import Systems, SystemsSpec

logger = logging.getLogger(__name__)

_READY = -1  # what a worker sends when its models are loaded; blocks are numbered from 0
_AHEAD = 4  # blocks that may wait, per worker, for an earlier one that takes long


@dataclass
class _Worker:
    """A process, this end of the pipe to it, and the block that it ranks."""

    device: str
    process: multiprocessing.process.BaseProcess
    connection: Connection
    number: int | None = _READY  # the block that it ranks; None: it waits


@dataclass
class _State:
    """Blocks by number.

    Attributes:
        given: blocks that are being ranked.
        lost: blocks whose worker has died.
        retried: blocks that have been lost once.
        ranked: rankings that wait for those of earlier blocks.
    """

    given: dict[int, Block] = field(default_factory=dict)
    lost: deque[tuple[int, Block]] = field(default_factory=deque)
    retried: set[int] = field(default_factory=set)
    ranked: dict[int, RankedBlock] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """An exception in a worker and its traceback, which exceptions lose on their way through a pipe."""

    error: Exception
    trace: str


class WorkerProcesses:
    """A `BlockRanker` on several devices.

        with WorkerProcesses(spec, ["cuda:0", "cuda:1"]) as workers:
            rerank_blocks(workers.rank, queries, run)

    Blocks are handed out in order to whoever is free, and their rankings come back in order, a few blocks ahead at
    most. When a worker dies (out of memory, a broken device), its block goes to another one, once; the job ends with
    an error when a block has lost two workers, or no worker is left. An error in a worker is raised here. CPU workers
    share the threads that torch has here.

    Args:
        spec: what each worker loads.
        devices: one worker each; a device may occur several times.
    """

    def __init__(self, spec: SystemsSpec, devices: Sequence[str]) -> None:
        import torch

        threads = max(1, torch.get_num_threads() // max(1, sum(device.startswith("cpu") for device in devices)))
        context = _fork_server()
        self._workers: list[_Worker] = []
        with _children_ignore_interrupts():
            try:
                for device in devices:
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_work,
                        args=(theirs, spec, device, threads, dict(os.environ)),
                        daemon=True,
                        name=f"qpeft rerank on {device}",
                    )
                    process.start()
                    theirs.close()  # so that its end of the pipe closes when it dies
                    self._workers.append(_Worker(device, process, ours))
            except BaseException:
                self.close()
                raise

    def rank(self, blocks: Iterator[Block]) -> Generator[RankedBlock]:
        """Rank the blocks; see `BlockRanker`.

        Raises: ChildProcessError when too many workers died; whatever a worker raised.
        """
        numbered = enumerate(blocks)
        state = _State()
        following = 0  # the block to yield next
        while True:
            for worker in self._workers:
                if worker.number is None and (state.lost or len(state.ranked) < _AHEAD * len(self._workers)):
                    numbered_block = state.lost.popleft() if state.lost else next(numbered, None)
                    if numbered_block is None:
                        break
                    worker.number, state.given[numbered_block[0]] = numbered_block
                    with contextlib.suppress(OSError):  # it has died: its pipe says so below
                        worker.connection.send(numbered_block)
            if not state.given:
                if (first := next(numbered, None)) is None:
                    return
                state.lost.append(first)  # nobody could take it: all are still loading
            ready = wait([worker.connection for worker in self._workers])
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                try:
                    number, answer = worker.connection.recv()
                except (EOFError, OSError):
                    self._bury(worker, state)
                    continue
                worker.number = None
                if isinstance(answer, _Failure):
                    raise answer.error from RuntimeError(answer.trace)
                if state.given.pop(number, None) is not None:
                    state.ranked[number] = answer
            while following in state.ranked:
                yield state.ranked.pop(following)
                following += 1

    def _bury(self, worker: _Worker, state: _State) -> None:
        """Take back the block of a worker that has died."""
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        code, number = worker.process.exitcode or 0, worker.number
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        what = f"the worker on {worker.device} {how}"
        if code == -signal.SIGKILL:
            what += " (the system does that when memory runs out)"
        if not self._workers:
            raise ChildProcessError(f"{what}, and no other is left")
        if number in state.retried:
            raise ChildProcessError(f"{what}, as one before it on the same queries")
        if number in state.given:
            state.retried.add(number)
            state.lost.append((number, state.given.pop(number)))
        logger.warning("%s; the others rank its queries", what)

    def close(self) -> None:
        """End all workers, whatever they are doing."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers.clear()

    def __enter__(self) -> WorkerProcesses:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


def _fork_server() -> multiprocessing.context.ForkServerContext:
    """Return how workers are started: by a process that has imported torch, once for all of them, and computed nothing.

    A fork of this process could use neither CUDA nor the threads of this one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Systems.__module__])
    return context


def _work(connection: Connection, spec: SystemsSpec, device: str, threads: int, environment: Mapping[str, str]) -> None:
    """Rank blocks until the pipe is closed, which it also is when the process that started this one was killed."""
    number = _READY
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # whoever started the server of forks
        os.environ.update(environment)  # what has changed since the server was started
        import torch
        from tqdm import tqdm

        tqdm.set_lock(RLock())  # its own lock has a semaphore, which a worker that is ended would leave behind
        torch.set_num_threads(threads)
        if device.startswith("cuda:"):
            # `Systems` says what is wrong with the device; a torch without CUDA lacks the attribute
            with contextlib.suppress(RuntimeError, AssertionError, AttributeError):
                torch.cuda.set_device(device)
        systems = Systems(spec, device)
        connection.send((_READY, None))
        while True:
            number, block = connection.recv()
            connection.send((number, systems(block)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        trace = traceback.format_exc()
        with contextlib.suppress(OSError):
            connection.send((number, _Failure(portable(error), trace)))


def portable(error: Exception) -> Exception:
    """Return an exception that another process can read: itself, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class may be unable to travel in any way it likes
        return ValueError(f"{type(error).__name__}: {error}")
    return error


@contextlib.contextmanager
def _children_ignore_interrupts() -> Iterator[None]:
    """Keep children that are started meanwhile from Ctrl-C, which a terminal sends to all: this process ends them."""
    resource_tracker.ensure_running()  # now, since its own start would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
