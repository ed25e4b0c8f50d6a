"""How many threads learn: as many as is fastest while the run goes on.

More threads are faster on a quiet machine and may be far slower on a busy one: where those of
OpenMP share out every layer they wait for each other after each, and where one of them is given no
processor an update may take 20 times as long. (How they share the work: `algorithms/teams.py`.) So
other numbers are tried, for a few updates: now and then, and when updates have become slower; a
faster one is kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

NUM_UPDATES = 3  # of a trial; one that is slower than usual ends it
RARELY = 20  # updates at least from one trial to the next
FASTER = 1.1  # times as fast fewer threads must be; more of them need not be
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
        self._usual: deque[float] = deque(maxlen=2 * NUM_UPDATES + 1)  # seconds, with `number`
        self._trial: list[float] = []
        self._trying: int | None = None
        self._next = 0  # index of what is tried next
        self._wait, self._trial_at = FIRST_SECONDS, None
        self._known = float("inf")  # seconds, when it was last compared
        set_num_threads(self.number)

    def __enter__(self) -> None:
        self._begun = self._clock()

    def __exit__(self, kind, *error) -> None:
        if kind is not None or len(self.choices) == 1:
            return
        now = self._clock()
        (self._usual if self._trying is None else self._trial).append(now - self._begun)
        if self._trial_at is None:
            self._trial_at = now + max(self._wait, RARELY * self._usual[0])
        elif self._trying is None:
            recent = list(self._usual)[-NUM_UPDATES:]
            slower = median(recent) > 2 * self._known
            if len(recent) == NUM_UPDATES and (slower or now >= self._trial_at):
                self._wait = FIRST_SECONDS if slower else self._wait
                self._usual = deque(recent, self._usual.maxlen)
                self._try_another()
        elif len(self._trial) == NUM_UPDATES or self._trial[-1] > median(self._usual):
            self._judge()
            self._trial_at = now + max(self._wait, RARELY * self._known)

    def _try_another(self) -> None:
        others = [number for number in self.choices if number != self.number]
        self._trying = others[self._next % len(others)]
        self._next += 1
        self._set(self._trying)

    def _judge(self) -> None:
        usual, tried = median(self._usual), median(self._trial)
        if tried * (FASTER if self._trying < self.number else 1) < usual:
            self._report(
                f"{self._trying} instead of {self.number} threads for learning: updates take "
                f"{1e3 * tried:.0f} instead of {1e3 * usual:.0f} ms"
            )
            self.number, self._wait = self._trying, FIRST_SECONDS
            self._usual = deque(self._trial, self._usual.maxlen)
        else:
            self._set(self.number)
            self._wait = min(2 * self._wait, MOST_SECONDS)
        self._known = median(self._usual)
        self._trying, self._trial = None, []
