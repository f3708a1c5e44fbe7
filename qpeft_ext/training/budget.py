"""How much of a training step is computed at once."""

from __future__ import annotations

import logging

from ..engine.schedule import default_tokens
from ..model import QPeftModel

logger = logging.getLogger(__name__)


class PassBudget:
    """The size of the passes of one trainer; halved, for good, when the device runs out of memory.

    The model's config stays as it is, since it is saved with the adapter: another device may have the memory.

    Attributes:
        max_tokens: token budget of a pass.
        max_pairs: pairs of a suffix pass at most; None until the memory was too small: what the config says.
    """

    def __init__(self, model: QPeftModel) -> None:
        self._config = model.qpeft_config
        self.max_tokens = default_tokens(model.device)
        self.max_pairs: int | None = None

    def halve(self, pairs: int) -> bool:
        """Halve both for a step of ``pairs`` pairs; False if passes are of one pair already."""
        before = min(filter(None, (self.max_pairs, self._config.suffix_micro_batch, pairs)))
        if before == 1:
            return False
        self.max_pairs, self.max_tokens = before // 2, max(1, self.max_tokens // 2)
        logger.warning(
            "out of memory: retrying the step with suffix_micro_batch=%d and passes of %d tokens",
            self.max_pairs,
            self.max_tokens,
        )
        return True
