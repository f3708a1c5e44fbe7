"""The models that a server has: adapters on one LM, which share it, its cache and its index."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.files import LM_ADAPTER, local_folder
from ..config import QPeftConfig
from ..lm.loading import default_device, load_lm, quiet_transformers
from ..model import get_qpeft_model
from ..prefixes.cache import DocumentCache
from ..ranking.reranker import Reranker
from ..ranking.without_adapter import config_without_adapter, template_without_adapter
from ..utils.inputs import short
from ..utils.memory import is_out_of_memory
from .errors import RequestError
from .settings import ServeSpec


@dataclass(eq=False)
class Served:
    """A model that requests may name.

    Attributes:
        name: the name.
        reranker: scores pairs.
        created: seconds since 1970 when it was loaded.
    """

    name: str
    reranker: Reranker
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def whole(self) -> bool:
        """Tell whether a score depends on all documents of its query, so that they are scored in one call."""
        return self.reranker.model.qpeft_config.source == "candidates"

    @property
    def limits(self) -> dict[str, int]:
        """Tokens of the longest document and query."""
        prompt = self.reranker.model.prompt
        return {"max_document_tokens": prompt.max_document_tokens, "max_query_tokens": prompt.max_query_tokens}


class Models:
    """Models by name; the first is the one of requests that name none.

    Args:
        spec: of the server.
        cache: of all models.
    """

    def __init__(self, spec: ServeSpec, cache: DocumentCache) -> None:
        self._spec = spec
        self._options = {"truncate_queries": True, **spec.reranker_options, "cache": cache}
        self._models: dict[str, Served] = {}
        self._lm: Any = None
        self._tokenizer: Any = None
        self._alone = ""  # name of a model whose adapter has an LM of its own
        self._loading = threading.Lock()
        self.cache = cache

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str | None) -> Served:
        """Return the model of this name, or the first. Raises: RequestError if there is none."""
        models = self._models
        if not name and models:
            return next(iter(models.values()))
        return models[_expect_known(name or "", models)]

    def load(self, name: str, adapter: str | None) -> Served:
        """Load an adapter, or the LM without clues for None.

        Raises: ValueError or OSError that says what is wrong; RequestError if the name is taken.
        """
        with self._loading:
            if name in self._models:
                raise RequestError("invalid", f"there is a model {name!r} already; delete it first", "name")
            quiet_transformers()
            own_lm = False
            if adapter is not None:
                folder = local_folder(adapter)
                config = QPeftConfig.from_pretrained(folder)
                own_lm = config.train_lm or (Path(folder) / LM_ADAPTER).is_dir()
            if self._alone or (own_lm and self._lm is not None):
                raise ValueError(
                    f"the adapter of {self._alone or name} changes the LM, so that no other can share it; serve it by "
                    "a server of its own"
                )
            served = Served(name, self._reranker(adapter))
            self._expect_usable(served.reranker)
            self._lm, self._tokenizer = served.reranker.model.lm, served.reranker.model.tokenizer
            self._alone = name if own_lm else ""
            self._models = self._models | {name: served}
            return served

    def _reranker(self, adapter: str | None) -> Reranker:
        spec = self._spec
        where = {**spec.lm_options, "device": default_device(spec.lm_options.get("device"))}
        if adapter is None:
            lm = load_lm(str(spec.base_model), **where) if self._lm is None else self._lm
            limits: dict[str, Any] = {**spec.config_options, **spec.token_limits}
            template = template_without_adapter(str(spec.base_model), lm.config, spec.template)
            config = config_without_adapter(str(spec.base_model), lm.config, template, **limits)
            return Reranker(get_qpeft_model(lm, config, self._tokenizer), **self._options)
        options = {**self._options, **spec.token_limits}
        if self._lm is not None:
            return Reranker.from_pretrained(adapter, self._lm, tokenizer=self._tokenizer, **options)
        device, dtype = where.pop("device"), where.pop("dtype", None)
        return Reranker.from_pretrained(adapter, spec.base_model, device, dtype, lm_kwargs=where, **options)

    @staticmethod
    def _expect_usable(reranker: Reranker) -> None:
        """Raises: ValueError if the longest prompt does not fit the LM, or the index is of another prompt."""
        prompt = reranker.model.prompt
        least, documents, queries = prompt.least_tokens, prompt.max_document_tokens, prompt.max_query_tokens
        reranker.model.engine.expect_fits(least + documents + queries - 1)
        reranker.expect_index()

    def load_below_root(self, name: str, adapter: str) -> Served:
        """Load an adapter while the server runs.

        Args:
            adapter: a folder, relative to the root.
        Raises: RequestError if there is no root, the folder is not below it, or it cannot be loaded.
        """
        if self._spec.models_root is None:
            raise RequestError("forbidden", "this server loads no models: it was started without --models-root")
        root = self._spec.models_root.resolve()
        try:
            folder = (root / adapter).resolve(strict=True)
            inside = folder.is_relative_to(root) and folder != root and folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            inside = False
        if not inside:
            raise RequestError("invalid", f"there is no folder {adapter!r} below the server's --models-root", "adapter")
        try:
            return self.load(name, str(folder))
        except (ValueError, TypeError, OSError) as error:
            if is_out_of_memory(error):
                raise
            message = str(error).replace(str(folder), adapter).replace(str(root), "--models-root")
            raise RequestError("invalid", f"the adapter cannot be loaded: {message}", "adapter") from error

    def unload(self, name: str) -> None:
        """Forget a model; requests that have it already are answered. Raises: RequestError if there is none."""
        with self._loading:
            _expect_known(name, self._models)
            self._models = {key: served for key, served in self._models.items() if key != name}
            if self._alone == name:
                self._alone, self._lm, self._tokenizer = "", None, None


def _expect_known(name: str, models: dict[str, Served]) -> str:
    """Return the name itself. Raises: RequestError if no model has it."""
    if name not in models:
        there = ", ".join(models) or "none"
        raise RequestError("not_found", f"there is no model {short(name)} here; there are: {there}", "model")
    return name
