"""What a run is doing, in numbers and in words: counters, rates, time shares, the bottleneck."""

import math
import time
from collections import defaultdict, deque

import numpy as np

from asyncrl.transport.ring import Ring, Word


class TimeShares:
    """Where one thread's time goes: `with shares.time("update"): ...`, nested as you like.

    Time inside a nested share belongs to the inner one only, so shares never add up to more than
    the wall time. `nanoseconds` is cumulative, by name. Not to be shared between threads.
    """

    def __init__(self):
        self.nanoseconds: dict[str, int] = defaultdict(int)
        self._open: list[str] = []  # names of the shares being timed, innermost last
        self._mark = self._last = time.perf_counter_ns()
        self._last_nanoseconds: dict[str, int] = {}

    def time(self, name: str) -> "TimeShares":
        """Name the share that the next `with` block belongs to; itself is the context."""
        self._name = name
        return self

    def __enter__(self):
        self._settle()
        self._open.append(self._name)

    def __exit__(self, *exception):
        self._settle()
        self._open.pop()

    def _settle(self) -> None:
        now = time.perf_counter_ns()
        if self._open:
            self.nanoseconds[self._open[-1]] += now - self._mark
        self._mark = now

    def fractions_since_last(self) -> dict[str, float]:
        """Fractions of the wall time since the last call (or construction), by share; the untimed
        remainder is `rest`, and they add up to 1."""
        self._settle()
        wall = max(self._mark - self._last, 1)
        fractions = {
            name: (total - self._last_nanoseconds.get(name, 0)) / wall
            for name, total in self.nanoseconds.items()
        }
        self._last, self._last_nanoseconds = self._mark, dict(self.nanoseconds)
        return fractions | {"rest": max(0.0, 1.0 - sum(fractions.values()))}


ACTOR_SHARES = {
    "env": Word.TIME_ENV,
    "inference": Word.TIME_INFERENCE,
    "write": Word.TIME_WRITE,
    "pull": Word.TIME_PULL,
    "wait": Word.TIME_WAIT,
}


class ActorShares:
    """Where the actors' time goes, on average, by what each writes into its first lane's ring."""

    def __init__(self, rings: list[Ring]):
        self.rings = rings
        self._mark, self._spent = time.monotonic_ns(), self._nanoseconds()

    def _nanoseconds(self) -> np.ndarray:
        """(actors, shares), cumulative."""
        return np.array([ring.words[list(ACTOR_SHARES.values())] for ring in self.rings])

    def fractions_since_last(self) -> dict[str, float]:
        """Fractions of the wall time since the last call (or construction), by share."""
        now, spent = time.monotonic_ns(), self._nanoseconds()
        fractions = (spent - self._spent).mean(0) / max(now - self._mark, 1)
        fractions /= max(fractions.sum(), 1.0)  # what began before the last call was booked since
        self._mark, self._spent = now, spent
        return dict(zip(ACTOR_SHARES, fractions.tolist(), strict=True))


class Rate:
    """A growing count, as a number per second. `count` is where it starts, not 0 after a resume."""

    def __init__(self, count: float = 0):
        self._count, self._time = count, time.perf_counter()

    def per_second_since_last(self, count: float) -> float:
        """Growth of `count` per second of wall time since the last call (or construction)."""
        now = time.perf_counter()
        rate = (count - self._count) / max(now - self._time, 1e-9)
        self._count, self._time = count, now
        return rate


class Lags:
    """How many versions the weights that acted were behind, of unrolls since the last look."""

    def __init__(self):
        self._lags: list[int] = []
        self._summary: dict[str, float] = {}

    def add(self, lag: int) -> None:
        self._lags.append(lag)

    def summary(self) -> dict[str, float]:
        """lag/min, lag/mean, lag/max; where nothing came in since, what was true then."""
        if self._lags:
            lags = np.array(self._lags)
            self._summary = {
                "lag/min": lags.min(), "lag/mean": lags.mean(), "lag/max": lags.max()
            }  # fmt: skip
            self._lags.clear()
        return self._summary


class EpisodeStatistics:
    """Returns and lengths of the last `window` episodes: of each policy, and of all together."""

    def __init__(self, policies: tuple[str, ...], window: int = 100):
        self.policies, self.window, self.num_episodes = tuple(policies), window, 0
        self._all: deque[tuple[float, int]] = deque(maxlen=window)  # (return, length)
        self._by_policy = [deque(maxlen=window) for _ in self.policies]

    def add(self, policy_index: int, return_: float, length: int) -> None:
        """Count one ended episode; `length` in env steps."""
        episode = (float(return_), int(length))
        self.num_episodes += 1
        self._all.append(episode)
        self._by_policy[policy_index].append(episode)

    def summary(self) -> dict[str, float]:
        """Means, as metrics: `episode/return`, `episode/length` over the last `window` episodes,
        and of both by policy, as `episode/return/NAME`. What has no episode yet is left out."""
        metrics = {}
        if self._all:
            metrics["episode/return"], metrics["episode/length"] = np.mean(self._all, axis=0)
        for policy, episodes in zip(self.policies, self._by_policy, strict=True):
            if episodes:
                means = np.mean(episodes, axis=0)
                metrics[f"episode/return/{policy}"], metrics[f"episode/length/{policy}"] = means
        return {name: float(value) for name, value in metrics.items()}

    def recent_lengths(self, policy: int) -> np.ndarray:
        """Lengths in env steps of a policy's last episodes, oldest first: (<= window,) int64."""
        return np.array([length for _, length in self._by_policy[policy]], dtype=np.int64)

    def write_lengths(self, table: np.ndarray) -> None:
        """Fill (policies, n) with each policy's last n lengths, and 0 where there are fewer."""
        table[...] = 0
        for policy, row in enumerate(table):
            recent = self.recent_lengths(policy)[-len(row) :]
            row[: len(recent)] = recent

    def state_dict(self) -> dict:
        """What a checkpoint keeps; JSON-able."""
        by_policy = dict(zip(self.policies, map(list, self._by_policy), strict=True))
        return {"num_episodes": self.num_episodes, "all": list(self._all), "by_policy": by_policy}

    def load_state_dict(self, state: dict) -> None:
        """Take over `state_dict()`, by policy name: the mix may have changed in between."""
        self.num_episodes = int(state["num_episodes"])
        self._all = deque(map(tuple, state["all"]), maxlen=self.window)
        self._by_policy = [
            deque(map(tuple, state["by_policy"].get(policy, ())), maxlen=self.window)
            for policy in self.policies
        ]


def who_waits(learner: float, actors: float, idle: float = 0.1) -> str:
    """Who waits for a larger share of its time, if that is more than `idle`."""
    if max(learner, actors) <= idle:
        return "nobody"
    return "learner" if learner >= actors else "actors"


_DOING = {
    "update": "in updates", "sync": "filling the store", "publish": "publishing weights",
    "checkpoint": "writing checkpoints", "log": "logging", "env": "stepping environments",
    "inference": "in inference", "pull": "pulling weights", "rest": "elsewhere",
}  # fmt: skip


def bottleneck(row: dict, idle: float = 0.1) -> str:
    """Which side of a run holds up the other, in words, from a metrics row.

    Only waiting decides: the side that waits less is the bottleneck, and is described by the share
    it spends most of its time in.

    1. No `time/learner/*` and no `time/actor/*`: "not known yet".
    2. Both sides wait less than `idle` of their time: "balanced: ...".
    3. Both wait `idle` or more, within 0.1 of each other: "turns: ...", as in lockstep.
    4. The actors wait more: "learner: ..."; the learner waits more: "actors: ...". Actors wait for
       room when the ring is 95 % full and the limiter does not hold them, else for the rate limit.
    """
    sides = [
        {
            name.removeprefix(side): share
            for name, share in row.items()
            if name.startswith(side) and share is not None and math.isfinite(share)
        }
        for side in ("time/learner/", "time/actor/")
    ]
    if not any(sides):
        return "not known yet"
    learner_wait, actor_wait = (shares.pop("wait", 0.0) for shares in sides)
    busiest = (max(shares.items(), key=lambda x: x[1], default=("rest", 0.0)) for shares in sides)
    (learner_does, learner), (actors_do, actors) = (
        (_DOING.get(name, f"in {name}"), percent(share)) for name, share in busiest
    )
    if max(learner_wait, actor_wait) < idle:
        return f"balanced: learner {learner} {learner_does}, actors {actors} {actors_do}"
    learner_waits, actors_wait = f"waits {percent(learner_wait)}", f"wait {percent(actor_wait)}"
    if min(learner_wait, actor_wait) >= idle and abs(learner_wait - actor_wait) < 0.1:
        return f"turns: the learner {learner_waits} of its time, actors {actors_wait}"
    if actor_wait > learner_wait:
        full = (row.get("ring/fill") or 0) >= 0.95 and row.get("limiter/waiting") != "actors"
        cause = "room in the ring" if full else "the rate limit"
        return f"learner: {learner} of its time {learner_does}; actors {actors_wait} for {cause}"
    return f"actors: the learner {learner_waits} for data; actors spend {actors} {actors_do}"


def percent(fraction: float) -> str:
    """0.831 as "83 %"."""
    return f"{100 * fraction:.0f} %"


def counted(number: float, noun: str) -> str:
    """1 actor, 2 actors."""
    return f"{number:.0f} {noun}{'s' * (number != 1)}"
