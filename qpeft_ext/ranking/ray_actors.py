"""`RayActors`: reranking on a Ray cluster with Ray Data, one actor per device (extra: ray)."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from .ray_session import RaySession, enter
from .run import Block, RankedBlock
from .systems import Systems, SystemsSpec
from .workers import portable

_RETRIES = 3  # of a block whose actor died, or could not read the corpus; each time on a fresh actor or another one


class RayActors:
    """A `BlockRanker` on Ray.

        with RayActors(spec, ["cuda", "cuda"]) as actors:
            rerank_blocks(actors.rank, queries, run)

    Each actor loads the models and opens the corpus, so the paths of the spec (or Hub ids) must be valid on every
    machine of the cluster; a relative one is below the working directory of this process. Only ids and query texts are
    sent. Blocks stream through the actors and come back in order; when an actor or its machine dies, Ray starts another
    one and repeats its block.

    Args:
        spec: what each actor loads.
        devices: as for `RaySession`.
    Raises: ImportError without Ray; ValueError for devices that Ray does not have.
    """

    def __init__(self, spec: SystemsSpec, devices: Sequence[str] = ()) -> None:
        self._session = RaySession(devices)
        try:
            import ray.data
        except ImportError:
            self._session.close()
            raise ImportError("--engine ray needs Ray: pip install 'qpeft_ext[ray]'") from None
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._ray, self._spec = ray, spec

    def rank(self, blocks: Iterator[Block]) -> Generator[RankedBlock]:
        """Rank the blocks; see `BlockRanker`. Raises: what an actor raised; ChildProcessError when too many died."""
        rows = [
            {
                "block": i,
                "system": block.system,
                "query_ids": block.query_ids,
                "queries": block.queries,
                "doc_ids": block.doc_ids,
            }
            for i, block in enumerate(blocks)
        ]
        if not rows:
            return
        data = self._ray.data
        context = data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = context.print_on_execution_start = False
        context.actor_task_retry_on_errors = [OSError]
        # one row in a Ray block: what streams, and what is repeated after a failure
        dataset = data.from_items(rows, override_num_blocks=len(rows))
        with warnings.catch_warnings():
            # the number of restarts has no other place, and without it Ray repeats for ever (see pyproject.toml)
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            dataset = dataset.map(
                _Actor,
                fn_constructor_args=(self._spec, self._session.kind, os.getcwd()),
                compute=data.ActorPoolStrategy(size=self._session.actors),
                num_gpus=int(self._session.kind == "cuda"),
                num_cpus=self._session.cpus,
                max_restarts=_RETRIES,
                max_task_retries=_RETRIES,
            )
        try:
            for i, row in enumerate(dataset.iter_rows()):
                if row["block"] != i:
                    raise ChildProcessError(f"Ray returned block {row['block']} where {i} was expected")
                yield _ranked(row)
        except self._ray.exceptions.RayError as error:
            raise _readable(error) from error

    def close(self) -> None:
        """Stop the Ray that was started here; one that ran before keeps running."""
        self._session.close()

    def __enter__(self) -> RayActors:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


class _Actor:
    """Ranks rows that are a `Block` each; Ray makes one actor per device."""

    def __init__(self, spec: SystemsSpec, device: str, folder: str) -> None:
        enter(folder)
        self.failure: Exception | None = None
        try:
            self.systems = Systems(spec, device)
        except Exception as error:  # raised here, Ray would print it several times and hide it in an error of its own
            self.failure = error

    def __call__(self, row: dict) -> dict:
        """Rank the block of a row. Raises: OSError, whereupon Ray repeats it; other errors become part of the row."""
        if self.failure is not None:
            return _failed(row["block"], self.failure)
        block = Block(
            list(row["query_ids"]), list(row["queries"]), [list(ids) for ids in row["doc_ids"]], row["system"]
        )
        try:
            return _row(row["block"], self.systems(block))
        except OSError:
            raise
        except Exception as error:
            return _failed(row["block"], error)


def _row(block: int, ranked: RankedBlock) -> dict[str, Any]:
    """Return a ranked block as values that Ray stores in a table."""
    return {
        "block": block,
        "error": b"",
        "places": [[place for place, _ in ranking] for ranking in ranked.rankings],
        "scores": [[score for _, score in ranking] for ranking in ranked.rankings],
        "counts": [getattr(ranked, field.name) for field in fields(RankedBlock)[1:]],
    }


def _failed(block: int, error: Exception) -> dict[str, Any]:
    return _row(block, RankedBlock([])) | {"error": pickle.dumps(portable(error))}


def _ranked(row: Mapping[str, Any]) -> RankedBlock:
    """Return the ranked block of a row. Raises: the exception that it has instead."""
    if row["error"]:
        raise pickle.loads(row["error"])
    rankings = [
        list(zip(map(int, places), map(float, scores), strict=True))
        for places, scores in zip(row["places"], row["scores"], strict=True)
    ]
    return RankedBlock(rankings, *map(int, row["counts"]))


def _readable(error: Exception) -> Exception:
    """Find our own error inside one of Ray, or else put that of Ray into one line."""
    inner: Any = error
    while inner is not None:
        if isinstance(inner, (ValueError, TypeError, OSError)) and not type(inner).__module__.startswith("ray"):
            return inner
        inner = getattr(inner, "cause", None) or inner.__cause__
    said = str(error).strip() or type(error).__name__
    return ChildProcessError(f"Ray gave up: {said.splitlines()[-1]}")
