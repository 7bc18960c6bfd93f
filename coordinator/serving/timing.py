"""What a batch takes on one replica, time(rows) = a + c * rows: learned from the batches that come back. Pure.

Least squares with exponential weights. Where all batches have about as many rows, nothing tells a from c: then their shares of the
time stay what they were, and only the sum follows. Before the first spread all of it counts as proportional, which makes small batches.
"""

from __future__ import annotations

FORGETTING = 0.1
"""Each batch takes so much of the weight of all before it: about the last ten count."""
CAUTION = 0.02
"""So much spread (variance by squared mean of the rows) is needed until it says as much as what was known before."""
OUTLIER = 4.0
"""A batch that takes so many times longer than any fit allows (a pause, a first call) counts as no more than that."""
ROWS_SEEN = 8.0
"""Up to so many rows the fit is taken to hold, whatever was seen."""
GUESS_SECONDS = 1e-3
"""A row on a replica of which nothing is known: it counts as quick, so that it is tried."""


class TimeModel:
    """`fixed_seconds` is a, `row_seconds` is c."""

    __slots__ = ("_mean_rows", "_mean_seconds", "_product", "_quick", "_spread", "fixed_seconds", "gain", "row_seconds")

    def __init__(self, row_seconds: float = GUESS_SECONDS) -> None:
        self.fixed_seconds = 0.0
        self.row_seconds = row_seconds
        self._quick = False
        self.gain = 0.0
        """What the next batch counts for, beside all before it; 0: nothing was learned yet."""
        self._mean_rows = self._mean_seconds = 0.0
        self._spread = self._product = 0.0
        """Variance of the rows, and covariance of rows and seconds."""

    @property
    def known(self) -> bool:
        return self.gain > 0.0

    def rows_per_second(self, limit: int) -> float:
        """What it does with batches of so many rows, or of as many as were seen, more or less: beyond that the fit is a guess. 0: unknown."""
        if self.gain == 0.0:
            return 0.0
        rows = 2.0 * self._mean_rows
        if rows < ROWS_SEEN:
            rows = ROWS_SEEN
        if rows > limit:
            rows = limit
        seconds = self.fixed_seconds + self.row_seconds * rows
        return rows / seconds if seconds > 0.0 else 0.0

    def seconds(self, rows: float) -> float:
        """What a batch of so many rows takes."""
        return self.fixed_seconds + self.row_seconds * rows

    def rows_within(self, seconds: float, at_most: int) -> int:
        """Rows that a batch may have to take no longer than that; one at least.

        Never so few that more than half of the time is the fixed part: that would answer hardly sooner, and give away most of what
        the replica can do.
        """
        fixed = self.fixed_seconds
        if self.gain == 0.0 or fixed + self.row_seconds * at_most <= seconds:
            return at_most
        each = max(self.row_seconds, 1e-9)
        rows = int(min(at_most, max(seconds - fixed, fixed) / each))
        if rows < 2 and self._mean_rows < 1.05:
            return min(2, at_most)  # nothing but single rows was seen: what two take is not known
        return max(1, rows)

    def learn(self, rows: int, seconds: float, *, alone: bool) -> None:
        """A batch of so many rows took so long; `alone`: nothing else was on its way to the replica.

        Time grows with the rows, and at most in proportion: what is far beyond that is chance. To be slow may be chance, to be quick
        is not: then what was known is forgotten. (The second of two answers that arrive together seems quick, so it takes two of those.)
        """
        if self.gain == 0.0:
            self._begin(rows, seconds)
            return
        share = rows / self._mean_rows
        low, high = (1.0, share) if share > 1.0 else (share, 1.0)
        if seconds * OUTLIER < self._mean_seconds * low:
            if alone or self._quick:
                self._begin(rows, seconds)
                return
            self._quick = True
        else:
            self._quick = False
            seconds = min(seconds, OUTLIER * self._mean_seconds * high)
        gain = self.gain = max(FORGETTING, self.gain / (1.0 + self.gain))
        more_rows, more_seconds = rows - self._mean_rows, seconds - self._mean_seconds
        mean_rows = self._mean_rows = self._mean_rows + gain * more_rows
        mean_seconds = self._mean_seconds = self._mean_seconds + gain * more_seconds
        part = gain * more_rows
        self._spread = (1.0 - gain) * (self._spread + part * more_rows)
        self._product = (1.0 - gain) * (self._product + part * more_seconds)
        told = self.fixed_seconds + self.row_seconds * mean_rows
        doubt = CAUTION * mean_rows * mean_rows
        before = self.row_seconds * mean_seconds / told if told > 0.0 else 0.0
        slope = (self._product + doubt * before) / (self._spread + doubt)
        slope = self.row_seconds = min(max(slope, 0.0), mean_seconds / mean_rows)
        self.fixed_seconds = max(0.0, mean_seconds - slope * mean_rows)

    def _begin(self, rows: int, seconds: float) -> None:
        """With the first batch, or what counts as such: a and c have the shares that they had."""
        told = self.seconds(rows)
        scale = seconds / told if told > 0.0 else 0.0
        self.fixed_seconds *= scale
        self.row_seconds *= scale
        self.gain, self._quick = 1.0, False
        self._mean_rows, self._mean_seconds = float(rows), seconds
        self._spread = self._product = 0.0
