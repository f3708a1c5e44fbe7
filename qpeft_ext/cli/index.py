"""``qpeft index``: keys and values of all documents on disk, for ``qpeft rerank --index``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..prompts.passages import check_passages
from .common import (
    LM,
    Attention,
    Device,
    Dtype,
    KvDtype,
    Passages,
    PassageStride,
    PassageTokens,
    Revision,
    SpecialTokens,
    Template,
    expect_at_least,
    expect_kv_dtype_of,
    expect_names,
)

if TYPE_CHECKING:
    from ..model import QPeftModel
    from ..prefixes.index_writer import IndexWriter


def command(
    corpus: Annotated[str, typer.Argument(help="Data set with documents, as for qpeft rerank --data.")],
    out: Annotated[Path, typer.Option("--out", "--output", help="Folder for the index; an index in it is continued.")],
    model: Annotated[str | None, typer.Option(help="The adapter whose LM and prompt are used.")] = None,
    base_model: Annotated[str | None, typer.Option(help=LM)] = None,
    template: Template = None,
    special_tokens: SpecialTokens = None,
    max_document_tokens: Annotated[
        int | None,
        typer.Option(help="Longest document in tokens; others are cut.  [default: the adapter's, or 256]"),
    ] = None,
    passages: Passages = None,
    passage_tokens: PassageTokens = None,
    passage_stride: PassageStride = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Read each document in its own pass, for rerank --deterministic; slower."),
    ] = False,
    max_tokens_per_batch: Annotated[int, typer.Option(help="Token budget of a pass.")] = 8192,
    kv_dtype: KvDtype = None,
    revision: Revision = None,
    dtype: Dtype = None,
    attention: Attention = None,
    device: Device = None,
) -> None:
    """Keep the keys and values of all documents on disk.

    Each document of the data set is read once by the LM. The index belongs to one LM, template, soft prompt, length
    limit and length of passages. The same command resumes an index that was interrupted, and extends one whose data
    set has grown.

    Example: qpeft index FOLDER --out INDEX --model ADAPTER, then qpeft rerank --index INDEX ...
    """
    expect_names(model=model, base_model=base_model)
    if not (model or base_model):
        raise ValueError("expected --model ADAPTER or --base-model LM")
    expect_at_least(1, max_document_tokens=max_document_tokens, max_tokens_per_batch=max_tokens_per_batch)
    check_passages(passages, passage_tokens, passage_stride)
    from .. import formats
    from ..utils.console import say

    expect_kv_dtype_of(kv_dtype, out)
    documents = formats.open_collection(corpus).corpus
    from ..lm.loading import default_device, quiet_transformers
    from ..prefixes.index_writer import IndexWriter
    from ..prompts.passages import Splitter

    device = default_device(device)
    quiet_transformers()
    where: dict[str, Any] = {"device": device, "dtype": dtype, "attention": attention, "revision": revision}
    asked = {"template": template, "special_tokens": special_tokens}
    qpeft = _model(model, base_model, asked, max_document_tokens, where)
    splitter = Splitter(qpeft.prompt, passage_tokens, passage_stride) if passages else None
    with IndexWriter(
        qpeft,
        documents,
        out,
        deterministic=deterministic,
        max_tokens_per_batch=max_tokens_per_batch,
        splitter=splitter,
        kv_dtype=kv_dtype,
    ) as writer:
        _write(writer)
    say(f"{out} is complete: qpeft rerank --index {out}")


def _write(writer: IndexWriter) -> None:
    """Say how much is missing, and write it."""
    from ..prefixes.survey import size
    from ..utils.console import Interrupted, say
    from ..utils.words import counted

    survey = writer.survey()
    cut = f", {survey.cut} cut to max_document_tokens" if survey.cut else ""
    split = f" in {counted(survey.passages, 'passages')}" if writer.splitter else ""
    there = f", {survey.there} of them {'is' if survey.there == 1 else 'are'} there already" if survey.there else ""
    say(
        f"{counted(survey.documents, 'documents')}{split}{cut}, {counted(survey.distinct, 'different ones')}{there}; "
        f"{survey.missing} to compute, {size(survey.nbytes)} to write to {writer.folder}"
    )
    writer.expect_room(survey)
    try:
        writer.run(survey)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; what was computed is kept, and the same command goes on from there") from None


def _model(
    model: str | None,
    base_model: str | None,
    asked: dict[str, Any],
    max_document_tokens: int | None,
    where: dict[str, Any],
) -> QPeftModel:
    """Load the adapter and its LM, or the LM without one.

    Args:
        asked: options of the prompt, which an adapter must agree with; None where they are not given.
        where: for `load_lm`.
    """
    from ..adapters.files import adapter_config
    from ..config import QPeftConfig
    from ..lm.loading import load_lm
    from ..model import QPeftModel, get_qpeft_model

    if model:
        adapter_config(model, asked)
        return QPeftModel.from_pretrained(model, base_model, max_document_tokens=max_document_tokens, **where)
    options = asked | {"max_document_tokens": max_document_tokens}
    config = QPeftConfig(clues="none", **{name: value for name, value in options.items() if value is not None})
    assert base_model is not None, "checked before"
    return get_qpeft_model(load_lm(base_model, **where), config)
