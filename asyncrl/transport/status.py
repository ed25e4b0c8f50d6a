"""The few words that all processes of a run share."""

from __future__ import annotations

import time

import numpy as np

STATUS_BYTES = 4096


class Status:
    """A few words all processes of a run share; each has one writer."""

    def __init__(self, buffer):
        self.words = np.ndarray((8,), np.int64, buffer, 0)
        self.numbers = np.ndarray((32,), np.float64, buffer, 1024)
        self.usage = self.numbers[16 : 16 + len(self.USAGE)]

    STOP, ALIVE, RESTARTS = range(3)  # written by the supervisor
    LEARNER_BEAT, EVALUATOR_BEAT = 3, 4  # written by their owners
    LEARNER_RESTARTS, EVALUATOR_RESTARTS = 5, 6  # by the supervisor
    DONE = 7  # by the learner, when all is saved
    EVALUATION = ("eval/return", "eval/life_return", "eval/life_score", "eval/length",
                  "eval/episodes", "eval/env_steps")  # fmt: skip
    # Written by the supervisor. Private memory, so that what is shared is counted once.
    USAGE = ("memory/supervisor_mb", "memory/learner_mb", "memory/actors_mb",
             "memory/evaluator_mb", "memory/shared_mb", "fds/supervisor", "fds/learner",
             "fds/actors", "fds/evaluator")  # fmt: skip

    @property
    def stopping(self) -> bool:
        return bool(self.words[self.STOP])

    def beat(self, word: int) -> None:
        self.words[word] = time.monotonic_ns()

    def metrics(self) -> dict[str, float]:
        """What the supervisor and the evaluator have to say in a row of metrics."""
        row = {
            "actors/alive": int(self.words[self.ALIVE]),
            "actors/restarts": int(self.words[self.RESTARTS]),
            "learner/restarts": int(self.words[self.LEARNER_RESTARTS]),
            "evaluator/restarts": int(self.words[self.EVALUATOR_RESTARTS]),
        }
        row |= {name: value for name, value in zip(self.USAGE, self.usage.tolist(), strict=True)
                if value}  # fmt: skip
        evaluation = dict(zip(self.EVALUATION, self.numbers.tolist(), strict=False))
        return row | (evaluation if evaluation["eval/episodes"] else {})
