"""The actor on real environments and plain memory: where a policy of the mix is drawn."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.models.cores import FrameStack
from asyncrl.policies import Greedy, Mixture, Part, Random
from asyncrl.switch_policies import RandomSwitch, Switch
from asyncrl.transport.ring import Ring, UnrollReader
from asyncrl.transport.weights import WeightsBuffer, WeightsReader, WeightsWriter, weights_fields
from asyncrl.types import Field, Spec, tree_map

pytest.importorskip("ale_py")
BREAKOUT = EnvConfig("ALE/Breakout-v5", num_threads=1)
T, B = 20, 2


class Indifferent(nn.Module):
    """Likes all four actions alike."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(4))

    def initial_state(self, num_envs):
        return {}

    def forward(self, obs, first, state):
        return {"q": self.q.expand(*first.shape, 4)}, state


def play(
    mix: Mixture, num_unrolls: int, model: nn.Module | None = None, precision: str = "auto"
) -> dict[str, np.ndarray]:
    """Columns (rows, B) of what an actor wrote."""
    model = model or Indifferent()
    config = ActorConfig(lanes_per_actor=1, envs_per_lane=B, unroll_length=T, precision=precision)
    envs = make_envs(BREAKOUT, 1)
    states = tree_map(lambda part: Field(tuple(part.shape[1:]), "uint8"), model.initial_state(1))
    spec = Spec(T, B, envs.observation_space, envs.action_space, states)
    envs.close()
    ring = Ring(bytearray(Ring.nbytes(spec, config.slots_per_lane)), spec, config.slots_per_lane)
    fields = weights_fields(model.state_dict(), context_fields(len(mix.parts)))
    buffer = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
    writer, reader, unrolls = WeightsWriter(buffer), UnrollReader(ring), []
    for name, tensor in model.state_dict().items():
        writer.back()["model"][name][...] = tensor
    writer.publish()
    actor = Actor(
        0, config, {0: ring}, WeightsReader(buffer), model, mix,
        lambda: make_envs(BREAKOUT, B), seed=1,
    )  # fmt: skip
    for unroll in range(num_unrolls):
        reader.permit(unroll + 1)
        actor.play()
        unrolls.append(tree_map(np.copy, reader.take()[0]))
        reader.release()
    actor.close()
    names = ("policy", "terminated", "episode_length", "first")
    columns = {name: np.concatenate([getattr(row, name)[:T] for row in unrolls]) for name in names}
    return columns | {"state": [row.state for row in unrolls]}


class Rounded(Indifferent):
    """Multiplies by a matrix, whose conversions to bfloat16 it counts."""

    def __init__(self):
        super().__init__()
        self.layer, self.rows, self.conversions = nn.Linear(84, 4), 0, 0

    def forward(self, obs, first, state):
        self.rows += 1
        with Conversions(self.layer.weight) as seen:
            q = self.layer(obs[..., 0, :] / 255)
        self.conversions += seen.count
        assert q.dtype == torch.bfloat16
        return {"q": q}, state


class Conversions(TorchDispatchMode):
    """How often a tensor is copied to another type."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.place, self.count = tensor.data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += args[0].data_ptr() == self.place
        return function(*args, **(kwargs or {}))


def test_weights_are_rounded_once_an_unroll_not_at_every_row():
    model = Rounded()
    play(Mixture((Part("greedy", Greedy()),)), 3, model, "bfloat16")
    assert model.rows == 3 * T
    assert model.conversions == 3


class Stacking(Indifferent):
    """Remembers frames, and counts the rows that it is asked about."""

    def __init__(self):
        super().__init__()
        self.stack, self.rows = FrameStack(4, (84, 84), torch.uint8), 0
        self.initial_state, self.advance = self.stack.initial_state, self.stack.advance

    def forward(self, obs, first, state):
        self.rows += 1
        _, state = self.stack(obs, first, state)
        return super().forward(obs, first, state)


class Seeing(Random):
    blind = False


class Own(Random):
    """Made from one that does not look, but may."""

    def __call__(self, *arguments):
        return super().__call__(*arguments)


def test_random_play_evaluates_no_net_and_remembers_what_it_would():
    blind, seeing, num_unrolls = Stacking(), Stacking(), 30
    played = play(Mixture((Part("random", Random()),)), num_unrolls, blind)
    expected = play(Mixture((Part("random", Seeing()),)), num_unrolls, seeing)
    assert (blind.rows, seeing.rows) == (num_unrolls, num_unrolls * T)
    assert played["first"].sum() > B  # episodes opened in the midst of unrolls
    for state, same in zip(played["state"], expected["state"], strict=True):
        np.testing.assert_array_equal(state["frames"], same["frames"])
    for policy in (Seeing(), Own()):
        mixed = Stacking()
        play(Mixture((Part("random", Random()), Part("seeing", policy, 0.0))), 2, mixed)
        assert mixed.rows == 2 * T


@pytest.mark.parametrize("scope", ["game", "life"])
def test_a_policy_is_drawn_at_each_game_or_life(scope):
    """Of 20 alike, so that the same one is hardly ever drawn twice in a row."""
    mix = Mixture(tuple(Part(str(i), Random()) for i in range(20)), scope)
    rows = play(mix, 40)
    changes = rows["policy"][1:] != rows["policy"][:-1]
    game, over = rows["first"][1:], rows["episode_length"][:-1] > 0
    life = rows["terminated"][:-1] & ~over
    assert game.sum() >= 4 and life.sum() >= 16
    assert not changes[~game & ~life & ~over].any()
    assert changes[game].mean() > 0.7
    if scope == "game":
        assert not changes[life].any()
    else:
        assert changes[life].mean() > 0.8


def test_lengths_by_policy_are_not_looked_at_where_parts_change_within_a_game():
    """A game is booked on the part of its last life, so a `Switch` would be led astray."""
    master, switch = Part("master", Greedy()), Switch(Greedy(), Random(), "master")
    for far in (switch, RandomSwitch(Greedy(), switch)):
        Mixture((master, Part("far", far)))
        with pytest.raises(ValueError, match=r'scope of "game" for far, .* got "life"; use "game"'):
            Mixture((master, Part("far", far)), "life")
    Mixture((master, Part("far", RandomSwitch(Greedy(), Random()))), "life")



def test_a_log_probability_that_is_none_is_not_handed_on():
    class Forgetful(Random):
        def __call__(self, outputs, state, first, step, context, rng):
            action, log_prob, state = super().__call__(outputs, state, first, step, context, rng)
            return action, np.where(step == 3, np.float32("nan"), log_prob), state

    mix = Mixture((Part("greedy", Greedy(), weight=0.0), Part("forgetful", Forgetful())))
    with pytest.raises(ValueError, match=r"from the policy forgetful, got nan .* at step 3 of an"):
        play(mix, 1)


def test_the_threads_of_environments_give_way_to_the_one_that_acts():
    def policies() -> dict[int, int]:
        threads = map(int, os.listdir("/proc/self/task"))
        return {thread: os.sched_getscheduler(thread) for thread in threads}

    before, seen = policies(), []

    class Looks(Indifferent):
        def forward(self, obs, first, state):
            seen.append(policies())
            return super().forward(obs, first, state)

    play(Mixture((Part("random", Random()),)), 1, Looks())
    made = seen[-1].keys() - before.keys()
    assert made and {seen[-1][thread] for thread in made} == {os.SCHED_BATCH}
    assert seen[-1][threading.get_native_id()] == os.SCHED_OTHER


def test_environments_may_use_gradients():
    """What an actor does without them is its own forward pass alone."""
    seen = []

    class Looks(Random):
        def __call__(self, *arguments):
            seen.append(torch.is_grad_enabled())
            return super().__call__(*arguments)

    play(Mixture((Part("random", Looks()),)), 1)
    assert seen and all(seen)
