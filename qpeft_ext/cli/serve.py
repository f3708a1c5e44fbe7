"""``qpeft serve``: rerank over HTTP, for clients of Cohere, Jina, vLLM and text-embeddings-inference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    LM,
    Attention,
    Device,
    Dtype,
    KvDtype,
    Option,
    Passages,
    PassageStride,
    PassageTokens,
    Revision,
    Template,
    expect_at_least,
    expect_kv_dtype_of,
    from_dataclass,
    parse_options,
)

if TYPE_CHECKING:
    from ..serving.settings import ServeSpec


@dataclass(frozen=True)
class ServeOptions:
    """Options of ``qpeft serve``, in the order of its help."""

    model: Annotated[
        list[str] | None,
        typer.Option(help="ADAPTER, or NAME=ADAPTER: a folder or Hub id. Repeat it for several on one LM."),
    ] = None
    base_model: Annotated[str | None, typer.Option(help=LM)] = None
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8080
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests must carry; may be repeated.  [default: $QPEFT_API_KEY, or none]"),
    ] = None
    models_root: Annotated[
        Path | None, typer.Option(help="Folder below which adapters may be loaded by POST /v1/models.")
    ] = None
    index: Annotated[
        Path | None, typer.Option(help="Index made by qpeft index: keys and values of documents are read from it.")
    ] = None
    corpus: Annotated[
        str | None, typer.Option(help="Data set whose documents requests may name by id, without their text.")
    ] = None
    cache_bytes: Annotated[int, typer.Option(help="Memory for keys and values of documents.")] = 1 << 30
    disk_cache: Annotated[Path | None, typer.Option(help="Folder for keys and values that outlive the server.")] = None
    disk_bytes: Annotated[int, typer.Option(help="Budget of --disk-cache in bytes.")] = 0
    kv_dtype: KvDtype = None
    dtype: Dtype = None
    attention: Attention = None
    device: Device = None
    revision: Revision = None
    template: Template = None
    option: Option = None
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Make scores bit-equal whatever is scored with them; slower.")
    ] = False
    max_query_tokens: Annotated[
        int | None, typer.Option(help="Longest query; a longer one is cut.  [default: the adapter's, or 64]")
    ] = None
    max_document_tokens: Annotated[
        int | None, typer.Option(help="Longest document; a longer one is cut.  [default: the adapter's, or 256]")
    ] = None
    passages: Passages = None
    passage_tokens: PassageTokens = None
    passage_stride: PassageStride = None
    max_tokens_per_batch: Annotated[
        int | None, typer.Option(help="Token budget of a pass of the LM.  [default: chosen for the device]")
    ] = None
    max_documents: Annotated[int, typer.Option(help="Documents of a request.")] = 1000
    max_body_bytes: Annotated[int, typer.Option(help="Size of a request.")] = 8 << 20
    max_queue_tokens: Annotated[int, typer.Option(help="Tokens that may wait; then requests get 429.")] = 2 << 20
    max_requests: Annotated[int, typer.Option(help="Requests at a time; then they get 429.")] = 512
    request_timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 300.0
    body_timeout: Annotated[float, typer.Option(help="Seconds until the body of a request must be there.")] = 30.0
    drain_seconds: Annotated[int, typer.Option(help="Seconds that requests have to end after SIGTERM.")] = 60
    engine: Annotated[
        str, typer.Option(help="Where the models are: local, in this process, or ray for replicas on Ray Serve.")
    ] = "local"
    replicas: Annotated[
        int | None,
        typer.Option(help="Replicas of --engine ray.  [default: one for each GPU of the Ray cluster, or one]"),
    ] = None
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error. Texts and paths are logged with debug only.")
    ] = "info"


@from_dataclass(ServeOptions)
def command(options: ServeOptions) -> None:
    """Rerank over HTTP.

    The routes are those of Cohere (/v2/rerank), Jina and vLLM (/v1/rerank, /rerank, /score) and
    text-embeddings-inference (/rerank with texts); /docs describes them. SIGTERM ends it after the last answer.

    Example: qpeft serve --model ADAPTER --port 8080
    """
    _check_options(options)
    spec = _spec(options)
    try:
        from ..serving.server import serve, serve_on_ray
    except ImportError as error:
        raise ImportError(f"qpeft serve needs {error.name}: pip install 'qpeft_ext[serve]'") from None

    rest = options.host, options.port, options.drain_seconds, options.log_level
    if options.engine == "ray":
        serve_on_ray(spec, options.replicas, *rest)
    else:
        serve(spec, *rest)


def _check_options(options: ServeOptions) -> None:
    """Raises: ValueError for options that are missing, exclude each other, or are out of range."""
    from ..prompts.passages import check_passages

    if not (options.model or options.base_model):
        raise ValueError("expected --model ADAPTER, or --base-model LM: a reranker, or any LM to score without clues")
    if options.model and (options.template is not None or options.option):
        raise ValueError("--template and --option are for --base-model without an adapter; leave them out")
    if not options.host.strip():
        raise ValueError("--host is empty, which would listen on all addresses; write 0.0.0.0 for that")
    expect_at_least(
        1,
        max_query_tokens=options.max_query_tokens,
        max_document_tokens=options.max_document_tokens,
        max_tokens_per_batch=options.max_tokens_per_batch,
        max_documents=options.max_documents,
        max_body_bytes=options.max_body_bytes,
        max_queue_tokens=options.max_queue_tokens,
        max_requests=options.max_requests,
        replicas=options.replicas,
    )
    expect_at_least(
        0,
        cache_bytes=options.cache_bytes,
        disk_bytes=options.disk_bytes,
        port=options.port,
        drain_seconds=options.drain_seconds,
    )
    expect_kv_dtype_of(options.kv_dtype, options.cache_bytes, options.index, options.disk_cache)
    if (options.disk_cache is None) != (options.disk_bytes == 0):
        raise ValueError("--disk-cache and --disk-bytes belong together")
    for name in ("request_timeout", "body_timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name):g}")
    if options.log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level must be debug, info, warning or error, got {options.log_level!r}")
    if options.models_root is not None and not options.models_root.is_dir():
        raise ValueError(f"--models-root must be a folder, got {options.models_root}")
    if options.engine not in ("local", "ray"):
        raise ValueError(f"--engine must be local or ray, got {options.engine!r}")
    if options.engine == "local" and options.replicas is not None:
        raise ValueError("--replicas is for --engine ray; leave it out, or start a server for each device")
    if options.engine == "ray" and options.models_root is not None:
        raise ValueError("--models-root loads models in one process; it cannot be used with --engine ray")
    check_passages(options.passages, options.passage_tokens, options.passage_stride)


def _spec(options: ServeOptions) -> ServeSpec:
    """Return what is served, of options that are right."""
    from ..serving.settings import Limits, ServeSpec

    given = {"max_document_tokens": options.max_document_tokens, "max_query_tokens": options.max_query_tokens}
    reranker = {
        "deterministic": options.deterministic,
        "max_tokens_per_batch": options.max_tokens_per_batch,
        "passages": options.passages,
        "passage_tokens": options.passage_tokens,
        "passage_stride": options.passage_stride,
    }
    return ServeSpec(
        models=_models(options.model, options.base_model),
        base_model=options.base_model,
        template=options.template,
        config_options=parse_options(options.option or ()),
        models_root=options.models_root,
        corpus=options.corpus,
        index=options.index,
        cache_bytes=options.cache_bytes,
        kv_dtype=options.kv_dtype,
        disk=None if options.disk_cache is None else (options.disk_cache, options.disk_bytes),
        api_keys=_keys(options.api_key),
        lm_options={
            "device": options.device,
            "dtype": options.dtype,
            "attention": options.attention,
            "revision": options.revision,
        },
        token_limits={name: limit for name, limit in given.items() if limit is not None},
        reranker_options=reranker,
        limits=Limits(
            max_body_bytes=options.max_body_bytes,
            max_documents=options.max_documents,
            max_queue_tokens=options.max_queue_tokens,
            max_requests=options.max_requests,
            request_timeout=options.request_timeout,
            body_timeout=options.body_timeout,
        ),
    )


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """Return the keys that were given, or that of the environment. Raises: ValueError for an empty one."""
    from ..serving.auth import Keys

    keys = tuple(given or filter(None, [os.environ.get("QPEFT_API_KEY")]))
    Keys(keys)  # which refuses them here, before anything is loaded
    return keys


def _models(given: list[str] | None, base_model: str | None) -> dict[str, str | None]:
    """Return adapters by name. Raises: ValueError for a name that is given twice."""
    if not given:
        return {Path(str(base_model)).name: None}
    models: dict[str, str | None] = {}
    for text in given:
        name, equals, adapter = text.partition("=")
        if not equals or os.path.exists(text):
            name, adapter = Path(text).name, text
        if not name or not adapter:
            raise ValueError(f"--model must be ADAPTER or NAME=ADAPTER, got {text!r}")
        if name in models:
            raise ValueError(f"two models have the name {name!r}; write --model NAME=ADAPTER")
        models[name] = adapter
    return models
