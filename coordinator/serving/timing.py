"""How long a batch takes on one replica, time(rows) = a + c * rows, learned from the batches that come back. Pure.

The fit is least squares with exponential weights. If all batches have about the same number of rows, a and c cannot be told
apart: then each keeps its share of the time, and only the sum follows. Until batches of different sizes were seen, all time
counts as proportional to the rows, which makes small batches.
"""

from __future__ import annotations

FORGETTING = 0.1
"""Each new batch takes this share of the weight of all earlier ones: about the last ten count."""
CAUTION = 0.02
"""At this spread (variance of the rows by their squared mean), new batches say as much as what was known before."""
OUTLIER = 4.0
"""A batch counts as at most this many times longer than any fit allows. It may have been a pause, or a first call."""
ROWS_SEEN = 8.0
"""The fit is trusted up to this many rows, whatever sizes were seen."""
GUESS_SECONDS = 1e-3
"""The time of a row on a replica that is not known yet: it counts as quick, so that it is tried."""


class TimeModel:
    """`fixed_seconds` is a, `row_seconds` is c."""

    __slots__ = ("_mean_rows", "_mean_seconds", "_product", "_quick", "_spread", "fixed_seconds", "gain", "row_seconds")

    def __init__(self, row_seconds: float = GUESS_SECONDS) -> None:
        self.fixed_seconds = 0.0
        self.row_seconds = row_seconds
        self._quick = False
        self.gain = 0.0
        """The weight of the next batch, beside all earlier ones; 0: nothing was learned yet."""
        self._mean_rows = self._mean_seconds = 0.0
        self._spread = self._product = 0.0
        """Variance of the rows, and covariance of rows and seconds."""

    @property
    def known(self) -> bool:
        return self.gain > 0.0

    @property
    def mean_rows(self) -> float:
        """About how many rows recent batches had: here the fit is surest. 0.0: no batch came back yet."""
        return self._mean_rows

    def rows_per_second(self, limit: int) -> float:
        """Its speed with batches of `limit` rows, or of about as many as were seen: beyond that the fit is a guess. 0: unknown."""
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
        """How long a batch of `rows` takes."""
        return self.fixed_seconds + self.row_seconds * rows

    def rows_within(self, seconds: float, at_most: int) -> int:
        """How many rows a batch may have if it is to take at most `seconds`; at least one.

        It is never so few rows that the fixed part is more than half of the time: answers would come hardly sooner, and the
        replica would lose most of its speed.
        """
        fixed = self.fixed_seconds
        if self.gain == 0.0 or fixed + self.row_seconds * at_most <= seconds:
            return at_most
        each = max(self.row_seconds, 1e-9)
        rows = int(min(at_most, max(seconds - fixed, fixed) / each))
        if rows < 2 and self._mean_rows < 1.05:
            return min(2, at_most)  # only single rows were seen: the time of two is not known
        return max(1, rows)

    def learn(self, rows: int, seconds: float, *, alone: bool) -> None:
        """Learn that a batch of `rows` took `seconds`; `alone`: no other batch was on its way to the replica.

        Time grows with the rows, at most in proportion. A time far beyond that is chance. A slow batch may be chance, but a quick
        batch is not: then what was known is forgotten. (When two answers arrive together, the second one seems quick. So two
        quick batches are needed.)
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
        """Start from the first batch, or from one that counts as the first: a and c keep their shares."""
        told = self.seconds(rows)
        scale = seconds / told if told > 0.0 else 0.0
        self.fixed_seconds *= scale
        self.row_seconds *= scale
        self.gain, self._quick = 1.0, False
        self._mean_rows, self._mean_seconds = float(rows), seconds
        self._spread = self._product = 0.0
