"""The actor on real environments and plain memory: where a policy of the mix is drawn."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.actor import Actor, ActorConfig, context_fields
from asyncrl.env_config import EnvConfig
from asyncrl.env_group import EnvGroup
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


def actor_of(
    config: ActorConfig,
    mix: Mixture,
    model: nn.Module,
    envs_of=lambda: make_envs(BREAKOUT, B),
    values: bool = False,
) -> tuple[Actor, list[UnrollReader], Callable[[dict], None]]:
    """An actor on plain memory, its lanes' other ends and what publishes a state dict."""
    envs = make_envs(BREAKOUT, 1)
    states = tree_map(lambda part: Field(tuple(part.shape[1:]), "uint8"), model.initial_state(1))
    its_spaces = envs.observation_space, envs.action_space
    spec = Spec(config.unroll_length, B, *its_spaces, states, values=values)
    envs.close()
    slots, lanes = config.slots_per_lane, range(config.lanes_per_actor)
    rings = {lane: Ring(bytearray(Ring.nbytes(spec, slots)), spec, slots) for lane in lanes}
    fields = weights_fields(model.state_dict(), context_fields(len(mix.parts)))
    buffer = WeightsBuffer(bytearray(WeightsBuffer.nbytes(fields)), fields)
    writer = WeightsWriter(buffer)

    def publish(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            writer.back()["model"][name][...] = tensor
        writer.publish()

    publish(model.state_dict())
    actor = Actor(0, config, rings, WeightsReader(buffer), model, mix, envs_of, seed=1)
    return actor, [UnrollReader(ring) for ring in rings.values()], publish


def play(
    mix: Mixture,
    num_unrolls: int,
    model: nn.Module | None = None,
    precision: str = "auto",
    values: bool = False,
) -> dict[str, np.ndarray]:
    """Columns (rows, B) of what an actor wrote."""
    config = ActorConfig(lanes_per_actor=1, envs_per_lane=B, unroll_length=T, precision=precision)
    actor, (reader,), _ = actor_of(config, mix, model or Indifferent(), values=values)
    unrolls = []
    for unroll in range(num_unrolls):
        reader.permit(unroll + 1)
        actor.play()
        unrolls.append(tree_map(np.copy, reader.take()[0]))
        reader.release()
    actor.close()
    names = ("policy", "terminated", "episode_length", "first")
    columns = {name: np.concatenate([getattr(row, name)[:T] for row in unrolls]) for name in names}
    return columns | {name: [getattr(row, name) for row in unrolls] for name in ("state", "value")}


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
        stack, state = self.stack(obs, first, state)
        outputs, state = super().forward(obs, first, state)
        return outputs | {"value": stack.float().mean((2, 3, 4))}, state


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
    assert (blind.rows, seeing.rows) == (1, num_unrolls * T)
    assert played["first"].sum() > B  # episodes opened in the midst of unrolls
    for state, same in zip(played["state"], expected["state"], strict=True):
        np.testing.assert_array_equal(state["frames"], same["frames"])
    for policy in (Seeing(), Own()):
        mixed = Stacking()
        play(Mixture((Part("random", Random()), Part("seeing", policy, 0.0))), 2, mixed)
        assert mixed.rows == 2 * T


def test_values_are_of_each_row_and_of_the_one_to_bootstrap_from_which_is_remembered_once():
    model, num_unrolls, mix = Stacking(), 30, Mixture((Part("random", Random()),))
    played = play(mix, num_unrolls, model, values=True)
    assert model.rows == num_unrolls * (T + 1)  # though nobody looks
    expected = play(mix, num_unrolls, Stacking())
    for state, same in zip(played["state"], expected["state"], strict=True):
        np.testing.assert_array_equal(state["frames"], same["frames"])
    for before, after in itertools.pairwise(played["value"]):
        assert before.shape == (T + 1, B) and (before > 10).all()
        np.testing.assert_array_equal(before[T], after[0])  # the weights are the same


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


class Biased(Indifferent):
    """Likes best what its bias does, at first action 1; `seen(rows)` is told of each row."""

    def __init__(self, seen: Callable[[int], None]):
        super().__init__()
        self.layer, self.rows, self.seen = nn.Linear(84, 4), 0, seen
        nn.init.zeros_(self.layer.weight)
        self.layer.bias.data = torch.eye(4)[1]

    def forward(self, obs, first, state):
        self.rows += 1
        self.seen(self.rows)
        return {"q": self.layer(obs[..., 0, :] / 255)}, state


def test_a_lane_goes_on_while_the_others_end_and_every_unroll_is_of_one_version():
    T, rounds, order = 3, 4, []

    class Watched(EnvGroup):
        """Says who is sent to and received from."""

        def __init__(self):
            super().__init__(make_envs(BREAKOUT, B)._env, BREAKOUT, B)
            self.lane = len(made)
            made.append(self)

        def send(self, action):
            order.append(f"send {self.lane}")
            super().send(action)

        def recv(self, *timeout):
            order.append(f"recv {self.lane}")
            return super().recv(*timeout)

    versions = itertools.count(2)

    def seen(row: int) -> None:
        """New weights, when the first lane has begun and in the middle: version v likes v % 4."""
        if row % (2 * T) in (1, T):
            bias = torch.eye(4)[next(versions) % 4]
            publish(model.state_dict() | {"layer.bias": bias})

    made, model = [], Biased(seen)
    config = ActorConfig(envs_per_lane=B, unroll_length=T, precision="bfloat16")
    mix = Mixture((Part("greedy", Greedy()),))
    actor, readers, publish = actor_of(config, mix, model, Watched)
    for played in range(1, rounds + 1):
        for reader in readers:
            reader.permit(played + (played < rounds))  # one more, but for the last round
        order.clear()
        actor.play()
        ends = ["recv 0", "send 0", "recv 1"] if played < rounds else ["recv 0", "recv 1"]
        assert order[-len(ends) :] == ends  # the next unroll of one beside this one of the other
        assert order.count("send 1") == T
        actions = []
        for reader in readers:
            unroll, _ = reader.take()
            assert (unroll.action == unroll.header.version % 4).all()
            actions.append(unroll.action.copy())
            reader.release()
        assert (actions[0] == actions[1]).all()
    assert model.rows == 2 * T * rounds
    actor.close()


def test_an_actor_leaves_with_a_step_under_way():
    actor, readers, _ = actor_of(ActorConfig(envs_per_lane=B, unroll_length=2),
                                 Mixture((Part("random", Random()),)), Indifferent())  # fmt: skip
    for reader in readers:
        reader.permit(2)
    actor.play()
    assert [lane.unroll is not None for lane in actor.lanes] == [True, False]
    actor.close()
