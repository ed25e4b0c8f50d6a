"""The LSTM core, called as those in `cores` are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """An LSTM (Hochreiter and Schmidhuber 1997); the state is its "h" and "c", float32 (B, size).

    T rows at once are T rows one by one: an unroll is cut at the rows in which any environment
    opens an episode, and each stretch is one call. On a CPU, where each call lays out the weights
    anew, short stretches (and the single rows of an actor) are computed row by row instead.
    """

    LONG = 7  # rows in a stretch, on average, from which calls are cheaper on a CPU

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
        opens = {row for row, opened in enumerate(first.any(1).tolist()) if opened}  # one wait
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
