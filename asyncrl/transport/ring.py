"""One lane: a ring of slots with a single producer and a single consumer.

Pure: it works on any buffer and knows no process. Every shared word has one writer:

    head       written by the actor:   unrolls committed
    tail       written by the learner: unrolls released
    permitted  written by the learner: unroll s may begin only if s < permitted
    beat ...   written by the actor:   its heartbeat and where its time went (nanoseconds), in the
                                       first of its lanes
    rebuilds   written by the actor:   how often its environments failed and were made anew
    gone       written by the supervisor: 1 once the actor is given up for good

Cursors only grow and are the truth; a slot that was not committed does not exist. Each word is an
aligned int64, stored and loaded whole; that a slot's bytes are seen before the head that covers
them rests on x86-64 keeping the order of stores (and of loads).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from asyncrl.types import Spec, Unroll

CONTROL_BYTES = 1024
WORD_STRIDE = 8  # one cache line a word: writers of different words do not share one


class Word(IntEnum):
    """The shared words of a lane."""

    HEAD = 0
    TAIL = 1
    PERMITTED = 2
    BEAT = 3
    TIME_ENV = 4
    TIME_INFERENCE = 5
    TIME_WRITE = 6
    TIME_PULL = 7
    TIME_WAIT = 8
    REBUILDS = 9
    GONE = 10


class Ring:
    """Views of one lane in `buffer`: its words and its slots."""

    def __init__(self, buffer, spec: Spec, num_slots: int):
        if num_slots < 1:
            raise ValueError(f"expected a ring of at least 1 slot, got {num_slots}")
        self.num_slots, self.spec = num_slots, spec
        self.words = np.ndarray(
            (CONTROL_BYTES // 8 // WORD_STRIDE,), np.int64, buffer, 0, (8 * WORD_STRIDE,)
        )
        layout, self.slot_bytes = spec.layout, spec.layout.nbytes
        offsets = [CONTROL_BYTES + slot * self.slot_bytes for slot in range(num_slots)]
        self.slots: list[Unroll] = [layout.views(buffer, offset) for offset in offsets]
        self.raw = [np.ndarray((self.slot_bytes,), np.uint8, buffer, offset) for offset in offsets]

    @staticmethod
    def nbytes(spec: Spec, num_slots: int) -> int:
        """Bytes of a lane of `num_slots` unrolls."""
        return CONTROL_BYTES + num_slots * spec.layout.nbytes

    def read(self, word: Word) -> int:
        return int(self.words[word])

    def start_at(self, sequence: int) -> None:
        """Set all cursors, before anything is permitted: the next unroll is `sequence`."""
        self.words[[Word.HEAD, Word.TAIL, Word.PERMITTED]] = sequence


class UnrollWriter:
    """The actor's side of a lane."""

    def __init__(self, ring: Ring):
        self.ring = ring

    @property
    def sequence(self) -> int:
        """Of the next unroll to begin."""
        return self.ring.read(Word.HEAD)

    def may_begin(self) -> bool:
        """Whether the next unroll is permitted and has a free slot."""
        # Read first what is written last as a resumed run sets all of them.
        permitted, tail = self.ring.read(Word.PERMITTED), self.ring.read(Word.TAIL)
        return self.sequence < min(permitted, tail + self.ring.num_slots)

    def reserve(self) -> Unroll | None:
        """The slot of the next unroll to fill in place, or None when it may not begin."""
        if not self.may_begin():
            return None
        return self.ring.slots[self.sequence % self.ring.num_slots]

    def commit(self) -> None:
        """Hand the reserved slot, filled, to the learner."""
        self.ring.words[Word.HEAD] += 1


class UnrollReader:
    """The learner's side of a lane. Several unrolls may be taken before they are released."""

    def __init__(self, ring: Ring):
        self.ring = ring
        self.taken = ring.read(Word.TAIL)

    def waiting(self) -> int:
        """Unrolls committed and not yet taken."""
        return self.ring.read(Word.HEAD) - self.taken

    def take(self) -> tuple[Unroll, np.ndarray] | None:
        """The oldest unroll not yet taken and its raw bytes, or None. Valid until released."""
        if self.taken >= self.ring.words[Word.HEAD]:
            return None
        slot = self.taken % self.ring.num_slots
        self.taken += 1
        return self.ring.slots[slot], self.ring.raw[slot]

    def release(self) -> None:
        """Give every taken slot back to the actor."""
        self.ring.words[Word.TAIL] = self.taken

    @property
    def permitted(self) -> int:
        return self.ring.read(Word.PERMITTED)

    def permit(self, sequence: int) -> None:
        """Let all unrolls before `sequence` begin. The throttle only moves forward."""
        if sequence > self.permitted:
            self.ring.words[Word.PERMITTED] = sequence
