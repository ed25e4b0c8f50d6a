"""Cores: what a network remembers between observations. `first` cuts every memory.

A core is called with (T, B, ...) inputs, `first` (T, B) and the state before row 0, and returns its
output and the state after row T-1. Its state is a dict of (B, ...) tensors that the actors send
with each unroll.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameStack(nn.Module):
    """The last k frames of the episode; the state is the last k-1 frames seen.

    Before the opening frame of an episode the stack repeats that frame, as Gymnasium's
    FrameStackObservation does. Frames cross the wire and lie in the replay once, un-stacked.
    """

    def __init__(self, size: int, frame_shape: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        self.size, self.frame_shape, self.dtype = size, frame_shape, dtype

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        if self.size == 1:
            return {}
        shape = (num_envs, self.size - 1, *self.frame_shape)
        return {"frames": torch.zeros(shape, dtype=self.dtype)}

    def forward(self, frames: Tensor, first: Tensor, state: dict) -> tuple[Tensor, dict]:
        """(T, B, *frame), or stacks that `prepare` made, -> (T, B, k, *frame), oldest first."""
        if frames.ndim > 2 + len(self.frame_shape):
            return frames.movedim(-1, 2), state
        if self.size == 1:
            return frames.unsqueeze(2), state
        T, B = first.shape
        if T == 1:
            return self._step(frames, first, state["frames"])
        before = self.size - 1
        history = torch.cat([state["frames"].transpose(0, 1), frames])  # (k-1+T, B, *frame)
        row = torch.arange(before, before + T, device=first.device).unsqueeze(1).expand(T, B)
        env = torch.arange(B, device=first.device).expand(T, B)
        # Row at which the episode of each row opened; the state's own rows are already cut.
        opened = torch.where(first, row, 0).cummax(0).values
        back = torch.arange(before, -1, -1, device=first.device)
        rows = torch.maximum(row.unsqueeze(2) - back, opened.unsqueeze(2))  # (T, B, k)
        # Whole frames by one index each: copies of memory, not of elements.
        index = (rows * B + env.unsqueeze(2)).flatten()
        stack = history.flatten(0, 1).index_select(0, index).unflatten(0, rows.shape)
        return stack, {"frames": stack[-1, :, 1:]}

    def prepare(self, frames: Tensor, first: Tensor, state: dict) -> tuple[Tensor, dict]:
        """One row (1, B, H, W) as whole stacks (1, B, H, W, k), which need no state. The values of
        a pixel lie side by side, as convolutions on a CPU want them."""
        stack = torch.stack([*state["frames"].unbind(1), frames[0]], -1)
        for env in first[0].nonzero().flatten().tolist():
            stack[env] = frames[0, env].unsqueeze(-1)
        return stack.unsqueeze(0), {}

    def advance(self, frames: Tensor, first: Tensor, state: dict) -> dict:
        """The state behind frames (T, B, *frame), which knows no more than k-1 of them."""
        kept = slice(-max(1, self.size - 1), None)
        return self(frames[kept], first[kept], state)[1]

    @staticmethod
    def _step(frames: Tensor, first: Tensor, before: Tensor) -> tuple[Tensor, dict]:
        """The same for one row, as actors have it, at a third of the cost."""
        frame = frames.transpose(0, 1)
        stack = torch.cat([before, frame], 1)  # (B, k, *frame)
        if first.is_cuda or torch.compiler.is_compiling():  # no waiting, no branch
            opens = first.view(-1, *[1] * (stack.ndim - 1))
            stack = torch.where(opens, frame, stack)
        else:  # few do, in a stack that may be large
            for env, opens in enumerate(first.tolist()[0]):
                if opens:
                    stack[env] = frame[env]
        return stack.unsqueeze(0), {"frames": stack[:, 1:]}
