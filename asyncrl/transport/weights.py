"""Weights the other way: pulled, versioned, never torn.

Two copies and one version word. The learner fills copy (v+1) % 2 and then writes the version; a
reader copies v % 2 and believes it only if the version is still v afterwards. Beside the weights
travels a small context: what schedules and policies need to know.
"""

from __future__ import annotations

import numpy as np

from asyncrl.types import Field, Layout, Tree

HEADER_BYTES = 64


class WeightsBuffer:
    """Views of the version word and the two copies in `buffer`."""

    def __init__(self, buffer, fields: Tree):
        self.layout = Layout(fields)
        self.version = np.ndarray((1,), np.int64, buffer, 0)
        offsets = [HEADER_BYTES, HEADER_BYTES + self.layout.nbytes]
        self.copies = [self.layout.views(buffer, offset) for offset in offsets]
        self.raw = [
            np.ndarray((self.layout.nbytes,), np.uint8, buffer, offset) for offset in offsets
        ]

    @staticmethod
    def nbytes(fields: Tree) -> int:
        return HEADER_BYTES + 2 * Layout(fields).nbytes


class WeightsWriter:
    """The learner's side: fill `back()`, then `publish()`."""

    def __init__(self, buffer: WeightsBuffer):
        self.buffer = buffer
        self._before = 0

    @property
    def version(self) -> int:
        """Of the last publication; 0 while there is none."""
        return int(self.buffer.version[0])

    def go_on_from(self, version: int) -> None:
        """Let the first publication be the one after `version`, as in a run that is resumed."""
        self._before = version

    def back(self) -> Tree:
        """The copy that readers do not believe, as a tree of numpy views to fill."""
        return self.buffer.copies[((self.version or self._before) + 1) % 2]

    def front(self) -> Tree:
        """The copy last published."""
        return self.buffer.copies[self.version % 2]

    def publish(self) -> int:
        """Make `back()` the current weights; returns the new version."""
        self.buffer.version[0] = (self.version or self._before) + 1
        return self.version


class WeightsReader:
    """An actor's side: `pull()` copies into private memory and says what to load."""

    def __init__(self, buffer: WeightsBuffer):
        self.buffer = buffer
        self._private = np.zeros(buffer.layout.nbytes, np.uint8)
        self._tree = buffer.layout.views(self._private)
        self.version = 0  # nothing pulled yet

    def pull(self, attempts: int = 3) -> Tree | None:
        """The newest weights as a tree of numpy views, or None if there are no newer ones.

        After `attempts` torn copies it gives up: whoever asked keeps what was loaded before and
        asks again at the next unroll; who has nothing yet goes on trying. The views are good until
        the next call.
        """
        while attempts > 0 or self.version == 0:
            attempts -= 1
            version = int(self.buffer.version[0])
            if version == self.version:
                return None
            np.copyto(self._private, self.buffer.raw[version % 2])
            if int(self.buffer.version[0]) == version:
                self.version = version
                return self._tree
        return None


def weights_fields(state_dict: dict, context: dict[str, Field]) -> Tree:
    """The fields of one copy: a model's `state_dict()` and the context beside it."""
    return {
        "model": {name: Field.of(tensor) for name, tensor in state_dict.items()},
        "context": context,
    }
