"""Adapters of `peft` that cannot be used: in our passes they would silently do nothing, or fail."""

from __future__ import annotations

from torch import nn

# a fresh adapter of these kinds changes nothing yet, so trying it would not show the problem
_UNREADABLE = {
    "XLORA": "weighs its experts by a pass of its own over token ids",
    "POLY": "asks for task_ids with every pass",
    "ADAPTION_PROMPT": "adds virtual tokens in its own forward",
    "SHADOW": "carries a second state that starts from token ids",
    "LILY": "chooses its experts by all tokens that are read together, later ones too",
}


def expect_readable_adapters(lm: nn.Module) -> None:
    """Check that the adapters of an LM read embeddings only.

    Raises: ValueError naming one that does not, active or not.
    """
    for name, config in (getattr(lm, "peft_config", None) or {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type)).upper()
        why = _UNREADABLE.get(kind)
        if getattr(config, "alora_invocation_tokens", None) is not None:
            kind, why = "activated LoRA", "looks for its invocation tokens among token ids"
        if why is not None:
            raise ValueError(
                f"the LM's adapter {name!r} ({kind}) {why}, and our passes read embeddings, several "
                "prompts together; give the LM without it (unload), or with an ordinary LoRA"
            )
