"""``qpeft index``: keys and values of all documents on disk, for ``qpeft rerank --index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import LM, Attention, Device, Dtype, Revision, expect_at_least


def command(
    corpus: Annotated[str, typer.Argument(help="Data set with documents, as for qpeft rerank --data.")],
    out: Annotated[Path, typer.Option(help="Folder for the index; an index in it is continued.")],
    model: Annotated[str | None, typer.Option(help="The adapter whose LM and prompt are used.")] = None,
    base_model: Annotated[str | None, typer.Option(help=LM)] = None,
    max_document_tokens: Annotated[
        int | None,
        typer.Option(help="Longest document in tokens; others are cut.  [default: the adapter's, or 256]"),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Read each document in its own pass, for rerank --deterministic; slower."),
    ] = False,
    max_tokens_per_batch: Annotated[int, typer.Option(help="Token budget of a pass.")] = 8192,
    revision: Revision = None,
    dtype: Dtype = None,
    attention: Attention = None,
    device: Device = None,
) -> None:
    """Keep the keys and values of all documents on disk.

    Each document of the data set is read once by the LM. The index belongs to one LM, template, soft prompt and
    length limit. The same command resumes an index that was interrupted, and extends one whose data set has grown.

    Example: qpeft index FOLDER --out INDEX --model ADAPTER, then qpeft rerank --index INDEX ...
    """
    if not (model or base_model):
        raise ValueError("expected --model ADAPTER or --base-model LM")
    expect_at_least(1, max_document_tokens=max_document_tokens, max_tokens_per_batch=max_tokens_per_batch)
    from .. import formats
    from ..utils.console import Interrupted, say

    documents = formats.open_collection(corpus).corpus
    from ..config import QPeftConfig
    from ..lm.loading import default_device, load_lm, quiet_transformers
    from ..model import QPeftModel, get_qpeft_model
    from ..prefixes.index_writer import IndexWriter, size

    device = default_device(device)
    quiet_transformers()
    where: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention, "revision": revision}
    if model:
        qpeft = QPeftModel.from_pretrained(model, base_model, max_document_tokens=max_document_tokens, **where)
    else:
        assert base_model is not None, "checked above"
        lm = load_lm(base_model, **where)
        limits: dict[str, Any] = {} if max_document_tokens is None else {"max_document_tokens": max_document_tokens}
        qpeft = get_qpeft_model(lm, QPeftConfig(clues="none", **limits))
    with IndexWriter(
        qpeft, documents, out, deterministic=deterministic, max_tokens_per_batch=max_tokens_per_batch
    ) as writer:
        survey = writer.survey()
        cut = f", {survey.cut} cut to max_document_tokens" if survey.cut else ""
        there = f", {survey.there} of them are there already" if survey.there else ""
        say(
            f"{survey.documents} documents{cut}, {survey.distinct} different ones{there}; "
            f"{survey.missing} to compute, {size(survey.nbytes)} to write to {out}"
        )
        writer.expect_room(survey)
        try:
            writer.run(survey)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; what was computed is kept, and the same command goes on from there"
            ) from None
    say(f"{out} is complete: qpeft rerank --index {out}")
