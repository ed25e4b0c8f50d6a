"""The one throttle there is: how many unrolls each lane may begin.

Rate limit, turns and pauses all move the same word of each lane's ring; an actor that has used up
what it was permitted waits for more.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from asyncrl.actor import ActorConfig
from asyncrl.transport.ring import UnrollReader, Word
from asyncrl.types import Spec


class Throttle:
    """Permits rounds: one unroll of each lane of an actor. `ring_actor(actor)` wakes one up."""

    def __init__(
        self,
        actors: ActorConfig,
        spec: Spec,
        readers: list[UnrollReader],
        store,
        ring_actor: Callable[[int], None],
    ):
        self.actors, self.store, self.ring_actor = actors, store, ring_actor
        lanes = actors.lanes_per_actor
        self.lanes = [readers[i * lanes : (i + 1) * lanes] for i in range(actors.num_actors)]
        self.round_env_steps = lanes * spec.unroll_length * spec.num_envs

    def move(self) -> None:
        """Let actors begin as many rounds as the store's rate limit covers, the least advanced
        first. What was permitted to an actor that is gone for ever counts for nothing."""
        limiter, each = self.store.limiter, self.round_env_steps
        most = min(self.actors.slots_per_lane + 1, limiter.rounds_ahead)
        ahead = []  # rounds permitted and not yet taken, by actor
        for own in self.lanes:
            permitted = min(reader.permitted for reader in own)
            ahead.append(permitted - min(reader.taken for reader in own))
        gone = [bool(own[0].ring.read(Word.GONE)) for own in self.lanes]
        begun = sum(rounds for rounds, lost in zip(ahead, gone, strict=True) if not lost)
        ahead = [most if lost else rounds for rounds, lost in zip(ahead, gone, strict=True)]
        budget = self.store.insert_limit() - limiter.inserted - begun * each
        if not begun and not self.store.updates_allowed():
            budget = max(budget, each)  # or nothing would ever come
        while budget >= each and min(ahead) < most:
            actor = int(np.argmin(ahead))
            self.permit(actor)
            ahead[actor] += 1
            budget -= each

    def permit(self, actor: int) -> None:
        """Let one actor begin a round more."""
        upto = min(reader.permitted for reader in self.lanes[actor]) + 1
        for reader in self.lanes[actor]:
            reader.permit(upto)
        self.ring_actor(actor)
