"""Cores: what a network remembers between observations. `first` cuts every memory.

A core is called with (T, B, ...) inputs, `first` (T, B) and the state before row 0, and returns its
output and the state after row T-1. Its state is a dict of (B, ...) tensors that the actors send
with each unroll.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

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
        """(T, B, *frame) -> (T, B, k, *frame), oldest frame first."""
        if self.size == 1:
            return frames.unsqueeze(2), state
        T, B = first.shape
        if T == 1:
            return self._step(frames[0], first[0], state["frames"])
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

    @staticmethod
    def _step(frame: Tensor, first: Tensor, before: Tensor) -> tuple[Tensor, dict]:
        """The same for one row, as actors have it, at a third of the cost."""
        frame = frame.unsqueeze(1)
        stack = torch.cat([before, frame], 1)  # (B, k, *frame)
        if first.any():
            stack[first] = frame[first]
        return stack.unsqueeze(0), {"frames": stack[:, 1:]}


class LSTM(nn.Module):
    """An LSTM (Hochreiter and Schmidhuber 1997); the state is its "h" and "c", float32 (B, size).

    T rows at once are T rows one by one: an unroll is cut at the rows in which any environment
    opens an episode, and each stretch is one call. On a CPU, where each call lays out the weights
    anew, short stretches (and the single rows of an actor) are computed row by row instead.
    """

    LONG = 8  # rows in a stretch, on average, from which calls are cheaper on a CPU

    def __init__(self, features: int, size: int):
        super().__init__()
        self.size = size
        self.lstm = nn.LSTM(features, size)
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter)
            else:
                nn.init.zeros_(parameter)
        with torch.no_grad():  # to begin with, remember (Gers et al. 2000)
            self.lstm.bias_ih_l0[size : 2 * size] = 1.0

    def initial_state(self, num_envs: int) -> dict[str, Tensor]:
        return {"h": torch.zeros(num_envs, self.size), "c": torch.zeros(num_envs, self.size)}

    def forward(self, features: Tensor, first: Tensor, state: dict) -> tuple[Tensor, dict]:
        """(T, B, features) -> (T, B, size), both float32."""
        output, states = self.states(features, first, state, [len(first)])
        return output, states[0]

    def states(
        self, features: Tensor, first: Tensor, state: dict, rows: Sequence[int]
    ) -> tuple[Tensor, list[dict]]:
        """(T, B, features) -> (T, B, size), and the states before `rows`; T: after the last."""
        T, memory = len(first), (state["h"], state["c"])
        opens = set(first.any(1).nonzero().flatten().tolist())
        cuts = sorted({0, *opens, *rows, T})
        if features.is_cuda or self.LONG * (len(cuts) - 1) <= T:
            stretch, features = self._call, [features[a:b] for a, b in pairwise(cuts)]
        else:
            lstm, stretch, cuts = self.lstm, self._row, range(T + 1)
            bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
            features = nn.functional.linear(features, lstm.weight_ih_l0, bias).unbind()
        outputs, before = [], {0: memory}
        for stretch_features, (begin, end) in zip(features, pairwise(cuts), strict=True):
            if begin in opens:  # filled rather than multiplied by 0, which would keep a NaN
                cut = first[begin].unsqueeze(1)
                memory = tuple(part.masked_fill(cut, 0) for part in memory)
            output, memory = stretch(stretch_features, memory)
            outputs.append(output)
            before[end] = memory
        states = [dict(zip("hc", before[row], strict=True)) for row in rows]
        return torch.cat(outputs), states

    def _call(self, features: Tensor, memory: tuple) -> tuple[Tensor, tuple]:
        """(rows, B, features) -> (rows, B, size), and the memory (h, c) behind them."""
        output, memory = self.lstm(features, tuple(part.unsqueeze(0) for part in memory))
        return output, tuple(part[0] for part in memory)

    def _row(self, gates: Tensor, memory: tuple) -> tuple[Tensor, tuple]:
        """The same of one row, whose share of the gates (B, 4 * size) the features have given."""
        h, c = memory
        gates = torch.addmm(gates, h, self.lstm.weight_hh_l0.t())
        enter, keep, new, leave = gates.chunk(4, 1)
        c = keep.sigmoid() * c + enter.sigmoid() * new.tanh()
        h = leave.sigmoid() * c.tanh()
        return h.unsqueeze(0), (h, c)
