"""Loading all weights of a model: transformers draws at random those that its files lack, and says so in a warning."""

from __future__ import annotations

from typing import Any


def load_weights(auto: type[Any], place: str, **kwargs: Any) -> Any:
    """Load a model of transformers, without remote code.

    Args:
        auto: the ``AutoModelFor…`` that loads it.
        place: folder or Hub id.
        kwargs: for ``from_pretrained``.
    Returns: the model.
    Raises: ValueError naming a weight that the files lack; and as ``from_pretrained``.
    """
    model, report = auto.from_pretrained(place, trust_remote_code=False, output_loading_info=True, **kwargs)
    if missing := sorted(report["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"its files lack the weight {missing[0]}{others}, which would be random; fetch them again")
    return model
