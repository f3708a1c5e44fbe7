"""`RayActors`: reranking on a Ray cluster with Ray Data, one actor per device (extra: ray)."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence

from .ray_session import RaySession
from .run import Block, RankedBlock
from .systems import Systems, SystemsSpec

_RETRIES = 3  # of a block whose actor died, or could not read the corpus; each time on a fresh actor or another one


class RayActors:
    """A `BlockRanker` on Ray.

        with RayActors(spec, ["cuda", "cuda"]) as actors:
            rerank_blocks(actors.rank, queries, run)

    Each actor loads the models and opens the corpus, so the paths of the spec (or Hub ids) must be valid on every
    machine of the cluster. Only ids and query texts are sent. Blocks stream through the actors and come back in
    order; when an actor or its machine dies, Ray starts another one and repeats its block.

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
        dataset = data.from_items(rows, override_num_blocks=len(rows)).map(
            _Actor,
            fn_constructor_args=(self._spec, self._session.kind),
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
                rankings = [
                    list(zip(map(int, places), map(float, scores), strict=True))
                    for places, scores in zip(row["places"], row["scores"], strict=True)
                ]
                yield RankedBlock(rankings, *map(int, row["counts"]))
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

    def __init__(self, spec: SystemsSpec, device: str) -> None:
        self.systems = Systems(spec, device)

    def __call__(self, row: dict) -> dict:
        block = Block(
            list(row["query_ids"]), list(row["queries"]), [list(ids) for ids in row["doc_ids"]], row["system"]
        )
        ranked = self.systems(block)
        return {
            "block": row["block"],
            "places": [[place for place, _ in ranking] for ranking in ranked.rankings],
            "scores": [[score for _, score in ranking] for ranking in ranked.rankings],
            "counts": [ranked.truncated, ranked.cache_hits, ranked.cache_misses],
        }


def _readable(error: Exception) -> Exception:
    """Find our own error inside one of Ray, or else put that of Ray into one line."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, (ValueError, TypeError, OSError)) and not type(inner).__module__.startswith("ray"):
            return type(inner)(str(inner).splitlines()[0])
        inner = getattr(inner, "cause", None) or inner.__cause__
    return ChildProcessError(f"Ray gave up: {str(error).strip().splitlines()[-1]}")
