"""`Speed`: how many tokens the scoring thread may compute until it looks at the queue again."""

from __future__ import annotations

_KEPT = 0.7  # weight of what was measured before, per pass of full length


class Speed:
    """Tokens per second of the passes so far, and the budget that follows from it.

    Args:
        seconds: wanted duration of a pass.
        most: largest budget in tokens.
        first: tokens per second before anything is measured.
    """

    def __init__(self, seconds: float, most: int, first: float = 500.0) -> None:
        self._wanted, self._most, self._first = seconds, most, first
        self._tokens = self._seconds = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """Take a pass into account; long passes count more than short ones."""
        keep = _KEPT ** min(1.0, seconds / self._wanted)
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds

    @property
    def tokens_per_second(self) -> float:
        """The mean of the last passes."""
        return self._tokens / self._seconds if self._seconds > 0 else self._first

    @property
    def budget(self) -> int:
        """Tokens of the next pass."""
        return max(1, min(self._most, int(self.tokens_per_second * self._wanted)))
