"""The two-sided rate limit: whichever of collecting and learning is ahead waits."""

from __future__ import annotations

from math import ceil, floor

COUNTERS = "inserted", "sampled", "starts_at", "counts_from"  # what a resumed one goes on from


class RateLimiter:
    """Keeps `sampled / (inserted - starts_at)` at `samples_per_insert`.

    Learning never runs ahead of that ratio; collecting may be ahead of it by at most `tolerance`
    env steps, which must cover one unroll of every lane and the env steps of one batch, or the two
    sides would wait for each other: refused at construction.
    """

    def __init__(
        self,
        samples_per_insert: float,
        batch_size: int,
        learning_starts: int,
        tolerance: int,
        round_env_steps: int,
    ):
        if samples_per_insert <= 0 or batch_size < 1 or learning_starts < 0:
            raise ValueError(
                "expected samples_per_insert > 0, batch_size >= 1 and learning_starts >= 0, got "
                f"{samples_per_insert}, {batch_size} and {learning_starts}"
            )
        least = ceil(round_env_steps + batch_size / samples_per_insert)
        if tolerance == 0:
            tolerance = 2 * least
        if tolerance < least:
            raise ValueError(
                f"expected a tolerance of at least {least} env steps, got {tolerance}: one unroll "
                f"of every lane is {round_env_steps} env steps and one batch stands for "
                f"{batch_size / samples_per_insert:g}; with less, actors and learner would wait "
                "for each other. Raise the tolerance or shorten the unrolls"
            )
        self.samples_per_insert = samples_per_insert
        self.batch_size = batch_size
        self.learning_starts = learning_starts
        self.tolerance = tolerance
        # Unrolls of each lane that may be begun and not yet inserted. Actors that hold more would,
        # if they died, hold back all others.
        self.rounds_ahead = floor((tolerance - batch_size / samples_per_insert) / round_env_steps)
        # Env steps from which on the ratio counts; earlier for a store that was filled anew, so
        # that what was sampled before stays counted ...
        self.starts_at = float(learning_starts)
        self.counts_from = self.starts_at  # ... and those at which updates may begin, or go on.
        self.inserted = 0  # env steps
        self.sampled = 0  # transitions

    @property
    def filling(self) -> bool:
        """Whether nothing is learned yet, or not again since the store was emptied."""
        return self.inserted < self.counts_from

    def updates_allowed(self) -> int:
        """Batches that may be drawn now."""
        owed = self.samples_per_insert * (self.inserted - self.starts_at) - self.sampled
        return max(0, floor(owed / self.batch_size))

    def insert_limit(self) -> float:
        """Env steps that may have been started in all."""
        return self.starts_at + self.sampled / self.samples_per_insert + self.tolerance

    def actual(self) -> float:
        """Samples per insert so far, nan before learning starts and while refilled."""
        if self.inserted <= self.counts_from:
            return float("nan")
        return self.sampled / (self.inserted - self.starts_at)

    def refill(self) -> None:
        """The store is empty, whatever was counted: `learning_starts` come in before updates."""
        learned_from = self.sampled / self.samples_per_insert
        self.counts_from = float(self.inserted + self.learning_starts)
        self.starts_at = self.counts_from - learned_from
