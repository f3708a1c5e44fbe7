"""The part of a result's settings that a plan decides, which can be compared without reading the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .methods import FIRST_STAGE, peft_options
from .plan import PASSAGE_OPTIONS, Method, Plan


def plan_settings(plan: Plan, method: Method, seed: int) -> dict[str, Any]:
    """Return what a result of a method depends on and the plan says, as plain values.

    Args:
        plan: the plan.
        method: one of its methods.
        seed: of the result.
    """
    settings: dict[str, Any] = {"method": method.method}
    if method.method == FIRST_STAGE:
        return settings
    settings["dtype"] = plan.dtype
    if method.of:
        return settings | {"of": plan_settings(plan, *plan.taken(method, seed))}
    settings |= method.passage_options
    settings["config"] = json.loads(json.dumps(plan.config(method, seed).to_dict()))
    if method.preset.trained:
        peft = peft_options(method.preset, method.peft) if method.preset.peft else None
        settings["training"] = asdict(method.training) | {"learning_rate": method.learning_rate, "peft": peft}
    return settings


def changed(there: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the names of the settings in which a result is not what a plan asks for.

    Args:
        there: settings of the result. What they lack is not compared: it may be an option of a later version.
        asked: of `plan_settings`.
        prefix: of the names.
    """
    found = [f"{prefix}{name}" for name in PASSAGE_OPTIONS if there.get(name) != asked.get(name)]
    for name in asked.keys() & there.keys() - set(PASSAGE_OPTIONS):
        # all options of peft are compared, since one that was given may be gone from the plan
        if name != "peft" and isinstance(there[name], dict) and isinstance(asked[name], dict):
            found += changed(there[name], asked[name], f"{prefix}{name}.")
        elif there[name] != asked[name]:
            found.append(f"{prefix}{name}")
    return sorted(found)
