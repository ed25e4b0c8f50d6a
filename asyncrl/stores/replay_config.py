"""The settings of a replay, and the memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from asyncrl.schedules import check_range
from asyncrl.stores.selection import Selection
from asyncrl.stores.sequences import SequenceShape
from asyncrl.types import Spec, tree_leaves


@dataclass(frozen=True)
class ReplayConfig:
    """How much is kept and how often it is learned from."""

    capacity: int = 1_000_000
    """Env steps kept."""
    samples_per_insert: float = 8.0
    """Transitions learned from an env step. An update stands for batch_size / samples_per_insert
    env steps, times sequence_length where sequences are drawn, also with loss_on="last"."""
    learning_starts: int = 20_000
    """Env steps before the first update."""
    tolerance: int = 0
    """Env steps that actors may run ahead of the ratio (0: twice the least possible)."""
    device: str = "auto"
    """"auto": on the GPU when it fits there, else in host memory; or a torch device."""
    priority_exponent: float = 0.0
    """Draw in proportion to |TD error| to this power, 0 to 1 (0: uniformly; 0.5 to 0.7 usual)."""
    importance_exponent: Any = 0.4
    """How far weights make up for that, 0 to 1: a number, or a schedule over env steps."""
    state_dtype: Literal["float16", "float32"] = "float16"
    """Of stored recurrent states."""
    refresh_states: bool = True
    """Replace stored recurrent states by those of the target net's pass whenever it makes one."""

    def __post_init__(self):
        if not 0 <= self.priority_exponent <= 1 or self.state_dtype not in ("float16", "float32"):
            raise ValueError(
                "expected 0 <= priority_exponent <= 1 and a state_dtype of float16 or float32, got "
                f"{self.priority_exponent} and {self.state_dtype!r}"
            )
        check_range("importance_exponent", self.importance_exponent, most=1)
        check_range("samples_per_insert", self.samples_per_insert, above=True)


def fits_on_gpu(device, nbytes: int) -> bool:
    """Whether a replay of that size fits beside the nets into what a CUDA device has free."""
    import torch

    torch.cuda.empty_cache()  # which would count as taken
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes < 0.8 * free


def rows_per_lane(
    spec: Spec, num_lanes: int, capacity: int, frame_stack: int, window: int, period: int = 1
) -> int:
    """Rows of a lane: its share of the capacity, and room for row T, context and windows; a
    multiple of `period`. ValueError for too small a capacity."""
    num_unrolls = max(1, -(-window // spec.unroll_length))
    least = num_unrolls * spec.unroll_length * spec.num_envs * num_lanes
    if capacity < least:
        unrolls = "one unroll" if num_unrolls == 1 else f"{num_unrolls} unrolls"
        raise ValueError(
            f"expected a replay capacity of at least {unrolls} of every lane, {least} env steps, "
            f"got {capacity}: a draw looks {window} rows ahead; raise the capacity or shorten "
            "unrolls, sequences or n_step"
        )
    share = -(-capacity // (num_lanes * spec.num_envs))
    return -(-(share + spec.unroll_length + 1 + frame_stack + window) // period) * period


def replay_nbytes(
    spec: Spec,
    num_lanes: int,
    capacity: int,
    frame_stack: int = 1,
    n_step: int = 1,
    priority_exponent: float = 0.0,
    sequence_length: int = 0,
    burn_in: int = 0,
    state_dtype: str = "float16",
    saved: bool = False,
) -> int:
    """Memory that a replay of these settings takes, for the preflight, or how much of it each
    checkpoint holds at most; ValueError for too small a capacity."""
    # Reward; first, terminated, truncated, valid.
    row = sum(field.nbytes for field in tree_leaves(spec.obs)) + spec.action.nbytes + 4 + 4
    window, period, entry = n_step, 1, 0
    if sequence_length:
        shape = SequenceShape(sequence_length, burn_in, n_step, state_dtype=state_dtype)
        window, period = shape.window, spec.unroll_length // spec.num_states
        entry = sum(field.nbytes for field in tree_leaves(shape.stored(spec)))
    rows = rows_per_lane(spec, num_lanes, capacity, frame_stack, window, period)
    seams = num_lanes * rows if sequence_length else 0
    count = num_lanes * rows * spec.num_envs
    entries = count // period
    states_and_priorities = entries * entry + Selection.nbytes(entries, priority_exponent)
    return states_and_priorities + (0 if saved else count * row + seams)
