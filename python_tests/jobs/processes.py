"""Processes that tests kill: `Forked` from this one, which has imported everything, and `Process`, a fresh interpreter.

A fork saves the seconds of CPU time in which an interpreter imports torch and transformers. A fresh interpreter is for
what a fork could hide: what is imported when, what another interpreter finds, which processes a command starts.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from threading import RLock

import torch
from tqdm import tqdm

import qpeft_ext as qpeft
from qpeft_ext.cli import main

_PAUSE = 0.002  # seconds between two looks at a process


class _Started:
    """What can be done with either kind of process."""

    pid: int

    def running(self) -> bool:
        """Return whether the process has not ended yet."""
        raise NotImplementedError

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code (negative: the signal that ended it), stdout and stderr."""
        raise NotImplementedError

    def send(self, which: signal.Signals) -> None:
        """Send a signal to the process; one that has ended gets none."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, which)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def wait_for(self, happened: Callable[[], object], seconds: float = 90) -> None:
        """Wait until ``happened()``; the process must be running then."""
        deadline = time.monotonic() + seconds
        while not happened():
            if not self.running():
                raise AssertionError(f"it ended too early: {self.end()}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"it took too long: {self.end()}")
            time.sleep(_PAUSE)

    def wait_for_size(self, path: Path, size: int) -> None:
        self.wait_for(lambda: path.exists() and path.stat().st_size >= size)


class Forked(_Started):
    """A forked process, in a group of its own, that does one piece of work and nothing else.

    Torch has one thread there, warnings are ignored, and no file of Python's own is written.

    Args:
        work: called in the child. It returns the exit code; None counts as 0. An exception is printed: exit code 1.
        room: how many bytes a file may have there, as if the disk were full (RLIMIT_FSIZE).
        environment: environment variables that are set there.
        seconds: `end` kills what takes longer, and raises AssertionError.
    """

    def __init__(
        self,
        work: Callable[[], int | None],
        *,
        room: int | None = None,
        environment: dict[str, str] | None = None,
        seconds: float = 120,
    ) -> None:
        self._seconds, self._code, self._texts = seconds, None, {}
        pipes = [os.pipe(), os.pipe()]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can handle it
        self.pid = os.fork()
        if not self.pid:
            code = 1
            try:
                _prepare([theirs for _, theirs in pipes], room, environment or {})
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                code = work() or 0
            except KeyboardInterrupt:  # before the work's own handler, or behind it
                code = 130
            except BaseException:
                traceback.print_exc()
            finally:  # whatever happened: the child must never run the rest of its parent's program
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for ours, theirs in pipes:
            os.close(theirs)
            os.set_blocking(ours, False)
            self._texts[ours] = b""

    def running(self) -> bool:
        if self._code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self._read()  # even while it runs, or it would wait for room in a pipe
            if done:
                self._code = os.waitstatus_to_exitcode(status)
                for pipe in self._texts:
                    os.close(pipe)
        return self._code is None

    def _read(self) -> None:
        for pipe in self._texts:
            with contextlib.suppress(BlockingIOError):
                while more := os.read(pipe, 1 << 16):
                    self._texts[pipe] += more

    def end(self) -> tuple[int, str, str]:
        latest = time.monotonic() + self._seconds
        while self.running():
            if time.monotonic() > latest:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it did not end in {self._seconds} s; it said {list(self._texts.values())}")
            time.sleep(_PAUSE)
        out, err = (text.decode(errors="replace") for text in self._texts.values())
        return self._code, out, err


def forked_command(arguments: list[str], **options) -> Forked:
    """Start a command of ``qpeft`` in a forked process; ``options``: those of `Forked`."""
    return Forked(lambda: main(arguments), **options)


def _prepare(streams: list[int], room: int | None, environment: dict[str, str]) -> None:
    """Give a forked process streams of its own; take the handlers, locks and threads of its parent from it."""
    gc.freeze()  # or a collection would go through all that was imported, and copy its pages
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without
    for number, stream in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
    logging.getLogger().handlers.clear()  # those of pytest
    warnings.simplefilter("ignore")
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    torch.set_num_threads(1)  # its pool is made again here, before threads that load weights do so at once
    tqdm.set_lock(RLock())  # its own lock is shared by all processes, and a killed one would never give it back
    forkserver._forkserver._forkserver_pid = None  # that of the parent, which this process could not wait for
    sys.dont_write_bytecode = True  # a .pyc file would be cut short too where room is limited, without a word
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def _hear_interrupts() -> None:
    """Let Ctrl-C end this process: a shell without job control makes those in its background ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process(_Started):
    """A command of ``qpeft`` in a fresh interpreter, in a group of its own."""

    def __init__(self, arguments: list[str]) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.path.dirname(os.path.dirname(qpeft.__file__)),
            "OMP_NUM_THREADS": "1",
        }
        self._popen = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "qpeft_ext.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
        self.pid = self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def end(self) -> tuple[int, str, str]:
        out, err = self._popen.communicate(timeout=90)
        return self._popen.returncode, out, err


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started and that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found
