"""``qpeft calibrate``: fit relevances in [0, 1] to judged queries, and store them in an adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.console import say
from ..utils.files import private_folder
from .common import DATA, LM, TRUNCATE_QUERIES, Attention, Device, Dtype, Revision, expect_at_least, from_dataclass

if TYPE_CHECKING:
    from ..ranking.reranker import Reranker


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of ``qpeft calibrate``, in the order of its help."""

    data: Annotated[str, typer.Option(help=DATA)]
    model: Annotated[
        Path | None, typer.Option(help="Folder of the adapter, which keeps the result in its config and card.")
    ] = None
    base_model: Annotated[str | None, typer.Option(help=LM)] = None
    output: Annotated[
        Path | None,
        typer.Option(help="Without --model: folder for a new adapter without clues, which keeps the result."),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(help="Split whose queries are judged; not one to be tested on.  [default: dev, or train]"),
    ] = None
    queries: Annotated[int, typer.Option(help="Number of queries that are drawn.")] = 200
    top_k: Annotated[int, typer.Option(help="Candidates of the first stage per query.")] = 20
    run: Annotated[
        Path | None,
        typer.Option(help="TREC run of the first stage.  [default: the candidates of the data set, or BM25]"),
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the queries that are drawn.")] = 0
    truncate_queries: Annotated[bool, typer.Option("--truncate-queries", help=TRUNCATE_QUERIES)] = False
    template: Annotated[
        str | None, typer.Option(help="Template of the prompt, without an adapter.  [default: qpeft]")
    ] = None
    score: Annotated[
        str | None,
        typer.Option(help="Score without an adapter: likelihood, yes_no, graded or both.  [default: likelihood]"),
    ] = None
    cache_bytes: Annotated[int, typer.Option(help="Memory for keys and values of documents.")] = 1 << 30
    revision: Revision = None
    dtype: Dtype = None
    attention: Attention = None
    device: Device = None


@from_dataclass(CalibrateOptions)
def command(options: CalibrateOptions) -> None:
    """Fit relevances in [0, 1] to judged queries.

    The adapter must not have been trained on these queries. The fit is measured on queries that are left out of it,
    stored in the adapter's config, and shown in its model card.

    Example: qpeft calibrate --model ADAPTER --data FOLDER --split dev
    """
    from ..adapters.files import save_calibration
    from ..lm.loading import quiet_transformers
    from ..ranking.judged import draw_judged

    expect_at_least(2, queries=options.queries, top_k=options.top_k)
    _check_places(options)
    judged = draw_judged(options.data, options.split, options.queries, options.top_k, options.run, options.seed)
    quiet_transformers()
    reranker = _reranker(options)
    calibration = reranker.calibrate(judged.queries, judged.documents, judged.relevant, judged.name)
    folder = options.model or options.output
    assert folder is not None  # checked before
    if options.output is not None:
        reranker.model.save_pretrained(folder)
    save_calibration(folder, calibration)
    say(calibration.describe())
    say(f"wrote it to {folder}")


def _check_places(options: CalibrateOptions) -> None:
    """Raises: ValueError if it is not clear where the result goes."""
    if (options.model is None) == (options.output is None):
        raise ValueError("expected --model ADAPTER, or --base-model LM with --output FOLDER for a new adapter")
    if options.output is not None:
        if options.base_model is None:
            raise ValueError("expected --base-model LM, since there is no adapter that names one")
        if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
            raise ValueError(f"--output {options.output} is there already; name a new folder")
    for name in ("template", "score"):
        if options.output is None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for --base-model without an adapter; leave it out")
    if options.model is not None:
        if not options.model.is_dir():
            raise ValueError(f"--model {options.model} is no folder, and the result is stored in the adapter's folder")
        with private_folder(options.model / "calibration"):  # it can be written
            pass


def _reranker(options: CalibrateOptions) -> Reranker:
    from ..lm.loading import default_device, load_lm
    from ..model import get_qpeft_model
    from ..prefixes.cache import DocumentCache
    from ..ranking.reranker import Reranker
    from ..ranking.without_adapter import config_without_adapter, template_without_adapter

    given = {"revision": options.revision, "attention": options.attention}
    place = {"device": default_device(options.device), "dtype": options.dtype}
    cache = DocumentCache(options.cache_bytes) if options.cache_bytes else None
    cut = options.truncate_queries
    if options.model is not None:
        return Reranker.from_pretrained(
            options.model,
            options.base_model,
            place["device"],
            place["dtype"],
            lm_kwargs=given,
            cache=cache,
            truncate_queries=cut,
        )
    assert options.base_model is not None, "checked before"
    lm = load_lm(options.base_model, **given, **place)
    template = template_without_adapter(options.base_model, lm.config, options.template)
    config = config_without_adapter(options.base_model, lm.config, template, score=options.score)
    return Reranker(get_qpeft_model(lm, config), cache=cache, truncate_queries=cut)
