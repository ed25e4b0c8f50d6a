"""The shared memory and the doorbells of a run, as its parent owns them.

They survive the death of any child. A child attaches them by `fds`: `asyncrl.run.Connections`.
"""

from __future__ import annotations

from asyncrl.folder import Refused
from asyncrl.plan import Plan
from asyncrl.spec_json import fields_from_json, spec_from_json
from asyncrl.transport.ring import Ring, Word
from asyncrl.transport.shared_memory import Doorbell, Segment
from asyncrl.transport.status import STATUS_BYTES, Status
from asyncrl.transport.weights import WeightsBuffer


class Memory:
    """All of it, zeroed; Refused where the system does not give it."""

    def __init__(self, plan: Plan):
        try:
            self._make(plan)
        except OSError as error:
            raise Refused(
                f"expected shared memory and doorbells for {plan.num_lanes} lanes, got {error}",
                "raise the limit (ulimit -f, -v and -n, the container's memory), or lower "
                "--actor.num-actors, --actor.envs-per-lane or --actor.slots-per-lane",
            ) from None

    def _make(self, plan: Plan) -> None:
        spec = spec_from_json(plan.spec)
        lane_nbytes = Ring.nbytes(spec, plan.slots_per_lane)
        weights_nbytes = WeightsBuffer.nbytes(fields_from_json(plan.weights))
        self.segments = {
            "status": Segment.create("status", STATUS_BYTES),
            "weights": Segment.create("weights", weights_nbytes),
        }
        self.lanes = [Segment.create(f"lane-{i}", lane_nbytes) for i in range(plan.num_lanes)]
        self.status = Status(self.segments["status"].buffer)
        self.rings = [Ring(lane.buffer, spec, plan.slots_per_lane) for lane in self.lanes]
        self.learner_bell, self.evaluator_bell = Doorbell.create(), Doorbell.create()
        self.actor_bells = [Doorbell.create() for _ in range(plan.num_actors)]
        self.fds = {
            **{name: segment.fd for name, segment in self.segments.items()},
            "lanes": [lane.fd for lane in self.lanes],
            "learner_bell": self.learner_bell.fd,
            "evaluator_bell": self.evaluator_bell.fd,
            "actor_bells": [bell.fd for bell in self.actor_bells],
        }

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in (*self.segments.values(), *self.lanes))

    def rings_of(self, actor: int) -> list[Ring]:
        """Its lanes."""
        lanes = len(self.rings) // len(self.actor_bells)
        return self.rings[actor * lanes : (actor + 1) * lanes]

    def last_beat(self, role: str, index: int) -> float:
        """When a process last said that it is alive, in seconds."""
        if role == "actor":
            return self.rings_of(index)[0].read(Word.BEAT) / 1e9
        word = Status.EVALUATOR_BEAT if role == "evaluator" else Status.LEARNER_BEAT
        return int(self.status.words[word]) / 1e9

    def ask_to_stop(self) -> None:
        """Set the word that says so, and wake everybody."""
        self.status.words[Status.STOP] = 1
        for bell in (self.learner_bell, self.evaluator_bell, *self.actor_bells):
            bell.ring()

    def clear(self) -> None:
        """Make lanes and weights as new, for children that will start from a checkpoint."""
        for ring in self.rings:
            ring.words[:] = 0
        self.segments["weights"].buffer[:8] = bytes(8)
