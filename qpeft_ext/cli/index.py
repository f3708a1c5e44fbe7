"""``qpeft index``: the prefix caches of a corpus on disk, for ``qpeft rerank --index``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import Attention, Device, Dtype


def command(
    corpus: Annotated[str, typer.Argument(help="Collection with a corpus, as for qpeft rerank --data.")],
    out: Annotated[Path, typer.Option(help="Folder for the index; an index there is gone on with.")],
    model: Annotated[str | None, typer.Option(help="Adapter: its LM and its prompt are used.")] = None,
    base_model: Annotated[str | None, typer.Option(help="LM.  [default: the one the adapter names]")] = None,
    max_document_tokens: Annotated[
        int | None, typer.Option(help="A longer document is cut.  [default: the adapter's, or 256]")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Compute each prefix alone, for rerank --deterministic; slower.")
    ] = False,
    max_tokens_per_batch: Annotated[int, typer.Option(help="Token budget of a pass.")] = 8192,
    dtype: Dtype = None,
    attention: Attention = None,
    device: Device = None,
) -> None:
    """Read every document of a corpus once and keep what the LM needs of it on disk.

    The index belongs to one LM, template, soft prompt and length limit. A run that was stopped goes on when it is
    started again, and so does one whose corpus has grown.
    """
    if not (model or base_model):
        raise ValueError("expected --model ADAPTER or --base-model LM")
    for option, value in (
        ("--max-document-tokens", max_document_tokens),
        ("--max-tokens-per-batch", max_tokens_per_batch),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}")
    from .. import formats
    from ..utils.console import Interrupted, say

    documents = formats.open_collection(corpus).corpus
    from ..config import QPeftConfig
    from ..lm.loading import default_device, load_lm, quiet_transformers
    from ..model import QPeftModel, get_qpeft_model
    from ..prefixes.index_writer import IndexWriter, size

    device = default_device(device)
    quiet_transformers()
    if model:
        qpeft = QPeftModel.from_pretrained(
            model, base_model, max_document_tokens=max_document_tokens, device=device, dtype=dtype, attention=attention
        )
    else:
        lm = load_lm(base_model, dtype=dtype, device=device, attention=attention)
        limits = {} if max_document_tokens is None else {"max_document_tokens": max_document_tokens}
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
