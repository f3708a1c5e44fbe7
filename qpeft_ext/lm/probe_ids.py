"""Token ids for passes that only look at an LM."""

from __future__ import annotations


def ordinary_ids(lm, count: int) -> list[int]:
    """Choose token ids spread over the vocabulary, without those that a config names (padding, images, ends)."""
    size = len(lm.get_input_embeddings().weight)
    named: set[int] = set()
    for config in (lm.config, lm.config.get_text_config()):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_ids", "_token_index", "_id")):
                named.update(i for i in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(i, int))
    free = [i for i in range(size // 16, size) if i not in named] or list(range(size))
    free = free[: max(count, len(free) // 2)]  # the last rows of a table are often untrained
    return [free[i * len(free) // count] for i in range(count)]
