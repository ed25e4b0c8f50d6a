"""How many threads learn: as many as is fastest while the run goes on.

More threads are faster on a quiet machine and may be far slower on a busy one: where those of
OpenMP share out every layer they wait for each other after each, and where one of them is given no
processor an update may take 20 times as long. (How they share the work: `algorithms/teams.py`.) So
other numbers are tried, now and then and when updates have become slower, and a faster one is kept.
A learner that waits for data needs no more threads than keep up: the same work costs less with few
of them, and the actors get the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

MOST_WON = 3  # pairs that decide a trial: an update with the other number, one with the usual
APART = 0.2  # seconds between pairs: actors act in bursts, in which fewer threads may be faster
LONG = 0.5  # seconds over which these even out: one pair of such updates lost ends a trial
FAR_SLOWER = 1.5  # times as slow: ends a trial at once
RARELY = 50  # updates at least after a trial that failed
FASTER = 1.1  # times as fast fewer threads must be; more of them need not be
KEEPS_UP = 0.9  # share of the time in updates that is no reason for more threads than that takes
SHORT_OF_TIME = 0.95  # share from which on more of them are of use
SLOW, SLOW_SECONDS = 2.0, 1.0  # times as slow as known, and for how long, to try others at once
FIRST_SECONDS, MOST_SECONDS = 5.0, 480.0  # between trials; twice as long after each that failed


def halves(most: int) -> list[int]:
    """most, most / 2, ..., 1."""
    return [most, *halves(most // 2)] if most > 1 else [1]


class Threads:
    """`with threads:` is one update, timed and made with `number` threads.

    `choices`: the first is begun with; of a single one nothing is tried. `report(text)` is told of
    every change.
    """

    def __init__(
        self,
        choices: Sequence[int],
        set_num_threads: Callable[[int], None],
        report: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.choices, self.number = list(choices), choices[0]
        self._set, self._report, self._clock = set_num_threads, report, clock
        self._active = self._other = self.number  # of this update; in trial
        self._tried: list[float] = []  # seconds, with the other one; of the usual after each:
        self._usual: list[float] = []
        self._fresh = True  # the first update with a number finds what the last one left: no count
        self._turn = 0  # index of what is tried next
        self._wait, self._next_at = FIRST_SECONDS, None  # when the next trial or pair begins
        self._latest = self._known = float("inf")  # seconds, of late and when last compared
        self._busy, self._since = 0.0, None  # seconds in updates, and from when on
        self._slow_since: float | None = None
        set_num_threads(self.number)

    def __enter__(self) -> None:
        self._begun = self._clock()

    def __exit__(self, kind, *error) -> None:
        if kind is not None or len(self.choices) == 1:
            return
        now = self._clock()
        seconds = now - self._begun
        fresh, self._fresh = self._fresh and seconds < LONG, False
        self._busy += seconds
        if self._since is None:
            self._since = self._begun
        if self._active != self.number:
            ratio = seconds / self._latest
            if ratio > FAR_SLOWER and not self._better(ratio, now):
                self._activate(self.number)
                self._fail(now)
            elif not fresh:
                self._tried.append(seconds)
                self._activate(self.number)
            return
        self._latest = seconds
        if fresh:
            return
        if len(self._usual) < len(self._tried):
            self._usual.append(seconds)
            self._next_at = now + APART
            self._judge(now)
        elif self._next_at is None:
            self._next_at = now + self._wait
        elif now >= self._next_at or self._is_slow(now, seconds):
            if not self._tried:
                others = [number for number in self.choices if number != self.number]
                self._other = others[self._turn % len(others)]
                self._turn += 1
            self._activate(self._other)

    def _activate(self, number: int) -> None:
        self._active, self._fresh = number, True
        self._set(number)

    def _is_slow(self, now: float, seconds: float) -> bool:
        """Whether updates have been slow all the time of late."""
        if self._tried or seconds <= SLOW * self._known:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        elif now >= self._slow_since + SLOW_SECONDS:
            self._slow_since, self._wait = None, FIRST_SECONDS
            return True
        return False

    def _judge(self, now: float) -> None:
        """End the trial where it is decided."""
        pairs = list(zip(self._tried, self._usual, strict=True))
        won = sum(self._better(tried / usual, now) for tried, usual in pairs)
        if len(pairs) - won == (1 if min(self._usual) >= LONG else MOST_WON):
            self._fail(now)
        elif won == MOST_WON:
            usual, tried = median(self._usual), median(self._tried)
            self._report(
                f"{self._other} instead of {self.number} threads for learning: updates take "
                f"{1e3 * tried:.0f} instead of {1e3 * usual:.0f} ms"
                + (", and data comes no sooner" if tried > usual else "")
            )
            self.number, self._wait, self._known = self._other, FIRST_SECONDS, tried
            self._activate(self.number)
            self._end(now + self._wait)

    def _better(self, ratio: float, now: float) -> bool:
        """Whether the other number is, with which an update takes `ratio` times as long."""
        share = self._busy / (now - self._since)
        if self._other < self.number:
            return ratio * FASTER < 1 or ratio * share < KEEPS_UP
        return ratio < 1 and share > SHORT_OF_TIME

    def _fail(self, now: float) -> None:
        self._wait = min(2 * self._wait, MOST_SECONDS)
        self._known = median(self._usual or [self._latest])
        self._end(now + max(self._wait, RARELY * self._known))

    def _end(self, next_at: float) -> None:
        self._tried, self._usual, self._next_at = [], [], next_at
        self._busy, self._since = 0.0, None
