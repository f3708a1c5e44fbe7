"""One reranking job, as ``qpeft rerank`` runs it: candidates in, a run file out, resumed where it was interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..formats.partial_run import PartialRun
from ..formats.trec import Run
from ..prefixes.index import PrefixIndex
from ..prompts.prompt import Prompt
from ..utils.console import Interrupted, say
from ..utils.words import counted
from .passages import PassageScoring
from .run import BlockRanker, RerankedRun, rerank_blocks, run_blocks
from .systems import Systems, SystemsSpec


def rerank_job(
    spec: SystemsSpec,
    queries: Mapping[str, str],
    candidates: Run,
    output: Path,
    *,
    engine: str = "local",
    devices: Sequence[str | None] = (None,),
    resume: bool = True,
) -> dict[str, RerankedRun]:
    """Rank the candidates with every system of a job; write the ranking of the main system.

    Blocks are kept in ``OUTPUT.part`` as soon as they are ranked. What is wrong with the output, the index or a query
    is found before the LM is loaded.

    Args:
        spec: the systems; the first of ``spec.names`` is the main one.
        queries: query_id -> text; only those of ``candidates`` are ranked.
        candidates: the run of the first stage.
        output: the TREC run to write.
        engine: "local" (this process, or one process for each of several devices) or "ray" (one actor for each).
        devices: where to rank; None leaves the device to the engine.
        resume: whether blocks are kept that an interrupted job with the same settings has ranked.
    Returns: the results by the names of the systems, in their order.
    Raises: ValueError for an output, an index or a query that does not fit the job; Interrupted after Ctrl-C, which
        says what was kept.
    """
    with contextlib.ExitStack() as stack:
        partials = _partial_runs(spec, queries, candidates, output, resume, stack)
        prompt = spec.prompt()
        passages = PassageScoring.of(prompt, spec.passages, spec.passage_tokens, spec.passage_stride)
        if spec.index:
            index = PrefixIndex(spec.index)
            index.expect_prompt(prompt, None if passages is None else passages.splitter.settings)
            index.kv_dtype_with(spec.kv_dtype)
        asked = {query_id: queries[query_id] for query_id in candidates}
        if cut := check_queries(prompt, asked, spec.truncate_queries):
            say(
                f"{cut} of {counted(len(candidates), 'queries')} {'is' if cut == 1 else 'are'} cut to "
                f"max_query_tokens = {spec.limits['max_query_tokens']}"
            )
        try:
            with block_ranker(engine, spec, devices) as rank:
                results = {
                    name: rerank_blocks(rank, queries, candidates, name=name, partial=partials[name])
                    for name in spec.names
                }
            for place, partial in enumerate(partials.values()):
                if place:
                    partial.discard()
                else:
                    partial.finish()
        except KeyboardInterrupt:
            raise Interrupted("; ".join(["interrupted", *_kept(partials)])) from None
        except Exception as error:
            for note in _kept(partials):
                error.add_note(note)
            raise
    return results


def _partial_runs(
    spec: SystemsSpec,
    queries: Mapping[str, str],
    candidates: Run,
    output: Path,
    resume: bool,
    stack: contextlib.ExitStack,
) -> dict[str, PartialRun]:
    """Open the files in which the systems' blocks are kept, until ``stack`` is left."""
    partials: dict[str, PartialRun] = {}
    settings, about = spec.settings(queries, candidates), spec.about()
    for place, name in enumerate(spec.names):
        threshold = None if place else spec.threshold  # it is of the main system
        partials[name] = PartialRun(
            output,
            candidates,
            settings | {"system": name} | ({} if threshold is None else {"threshold": threshold}),
            about=about,
            name=name.replace(" ", "-") if place else "",
            resume=resume,
            blocks=run_blocks(candidates),
            complete=threshold is None,
        )
        stack.callback(partials[name].close)
        if partials[name].num_resumed:
            say(f"{partials[name]}: going on from there")
    return partials


@contextlib.contextmanager
def block_ranker(engine: str, spec: SystemsSpec, devices: Sequence[str | None]) -> Iterator[BlockRanker]:
    """Load the systems of a job where they shall run, and free them in the end: see `rerank_job`."""
    if engine == "ray":
        from .ray_actors import RayActors

        with RayActors(spec, [device for device in devices if device]) as actors:
            yield actors.rank
    elif len(devices) > 1:
        from .workers import WorkerProcesses

        with WorkerProcesses(spec, [device for device in devices if device]) as workers:
            yield workers.rank
    else:
        systems = Systems(spec, devices[0])
        yield lambda blocks: (systems(block) for block in blocks)


def check_queries(prompt: Prompt, queries: Mapping[str, str], truncate: bool) -> int:
    """Tokenise all queries first: one that is too long is an error now, not after an hour.

    Returns: how many are cut, with ``truncate``.
    Raises: ValueError that names the query.
    """
    cut: list[int] | None = [] if truncate else None
    for query_id, text in queries.items():
        try:
            prompt.queries([text], cut)
        except ValueError as error:
            raise ValueError(f"query {query_id!r}: {error}") from None
    return len(cut or ())


def _kept(partials: Mapping[str, PartialRun]) -> list[str]:
    """Say what is left of the work, if anything."""
    kept = [str(partial) for partial in partials.values() if partial.rankings]
    return [f"{', '.join(kept)}: the same command goes on from there"] if kept else []
