"""`Speed`: how many tokens the scoring thread may compute until it looks at the queue again."""

from __future__ import annotations

_KEPT = 0.9  # weight of what was measured before, per pass
_GROWTH = 4
_AIM = 0.8  # of the wanted duration, since some passes take longer than the last ones did


class Speed:
    """Durations of the passes so far, and the budget that follows from them.

    A pass takes a time of its own and one for each token, which are fitted to the last passes. A budget fills eight
    tenths of the wanted time, or takes twice the pass's own time if that is longer: on a slow machine passes of a
    single pair would never end. A fit to short passes says little about long ones, so a budget is at most four times
    the longest of the last ones.

    Args:
        seconds: longest duration of a pass, mostly.
        most: largest budget in tokens.
        first: tokens per second before anything is measured.
    """

    def __init__(self, seconds: float, most: int, first: float = 500.0) -> None:
        self._wanted, self._most, self._first = seconds, most, first
        self._passes = self._tokens = self._seconds = self._squares = self._products = self._longest = 0.0

    def measured(self, tokens: int, seconds: float) -> None:
        """Take a pass into account."""
        self._passes = _KEPT * self._passes + 1
        self._tokens = _KEPT * self._tokens + tokens
        self._seconds = _KEPT * self._seconds + seconds
        self._squares = _KEPT * self._squares + tokens * tokens
        self._products = _KEPT * self._products + tokens * seconds
        self._longest = max(_KEPT * self._longest, tokens)

    @property
    def tokens_per_second(self) -> float:
        """The mean of the last passes."""
        return self._tokens / self._seconds if self._seconds > 0 else self._first

    @property
    def budget(self) -> int:
        """Tokens of the next pass."""
        own, each = self._fitted()
        wanted = _AIM * self._wanted
        tokens = min((max(wanted, 2 * own) - own) / each, max(_GROWTH * self._longest, wanted * self._first))
        return max(1, min(self._most, int(tokens)))

    def _fitted(self) -> tuple[float, float]:
        """Fit seconds of a pass, and of a token; by least squares where passes differ in length."""
        mean = 1 / self.tokens_per_second
        spread = self._passes * self._squares - self._tokens**2
        if spread <= 1e-6 * self._passes * self._squares:
            return 0.0, mean
        each = (self._passes * self._products - self._tokens * self._seconds) / spread
        each = min(max(each, mean / 10), mean)  # noise may say that long passes are the quicker ones
        return max(0.0, (self._seconds - each * self._tokens) / self._passes), each
