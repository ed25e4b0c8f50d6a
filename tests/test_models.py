"""Models: the frame stack is Gymnasium's, T steps at once are T steps one at a time, normalisers
know what numpy knows of all rows at once."""

from __future__ import annotations

from itertools import pairwise

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation

from asyncrl.algorithms.distributions import unsquash
from asyncrl.models import ModelConfig, Network
from asyncrl.models.contract import try_model
from asyncrl.models.cores import FrameStack
from asyncrl.models.heads import ActorCriticHead, Gaussian, QHead
from asyncrl.models.layers import StreamConfig
from asyncrl.models.lstm import LSTM
from asyncrl.models.memory import states_before
from asyncrl.models.normalizers import PopArt, RunningStatistics
from asyncrl.models.return_heads import C51, IQN
from asyncrl.models.torsos import NatureTorso, SmallImageTorso, has_channels_last
from asyncrl.state import flatten, unflatten
from asyncrl.types import tree_map


class Noise(gymnasium.Env):
    """Episodes of random length (some of one step) of random frames."""

    observation_space = spaces.Box(0, 255, (2, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def observe(self):
        return self.np_random.integers(0, 256, (2, 3), np.uint8)

    def step(self, action):
        return self.observe(), 0.0, self.np_random.random() < 0.25, False, {}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_frame_stack_is_gymnasiums_at_once_in_pieces_and_step_by_step(size):
    T, B = 60, 3
    first, stacks = torch.zeros(T, B, dtype=torch.bool), np.zeros((T, B, size, 2, 3), np.uint8)
    for env in range(B):
        # Before an episode the wrapper repeats its first frame.
        wrapped = FrameStackObservation(Noise(), size, padding_type="reset") if size > 1 else (
            gymnasium.wrappers.ReshapeObservation(Noise(), (1, 2, 3)))  # fmt: skip
        ended, seed = True, env
        for t in range(T):
            if ended:
                (stacks[t, env], _), ended = wrapped.reset(seed=seed), False
                first[t, env], seed = True, None
            else:
                stacks[t, env], _, ended, _, _ = wrapped.step(0)
    assert first[1:].any(1).sum() > 10
    frames, want = torch.from_numpy(stacks[:, :, -1]), torch.from_numpy(stacks)

    core = FrameStack(size, (2, 3), torch.uint8)
    for lengths in ([T], [1] * T, [7] * 8 + [4]):
        state, begin = core.initial_state(B), 0
        for length in lengths:
            rows = slice(begin, begin + length)
            stack, state = core(frames[rows], first[rows], state)
            assert stack.dtype == torch.uint8 and torch.equal(stack, want[rows])
            assert size == 1 or torch.equal(state["frames"], want[rows][-1, :, 1:])
            begin += length


GREY, MATRIX = spaces.Box(0, 255, (84, 84), np.uint8), spaces.Box(-1, 1, (4, 5))
PARTS = {
    "image": spaces.Box(0, 255, (36, 40, 3), np.uint8),
    "on": spaces.MultiBinary(4),
    "more": spaces.Tuple([spaces.Discrete(3, start=5), spaces.Box(-1, 1, (2,))]),
}
OBSERVATIONS = [
    (GREY, 4),
    (spaces.Box(0, 255, (40, 36, 3), np.uint8), 2),
    (spaces.Box(0, 255, (3, 36, 40), np.uint8), 2),
    (spaces.Box(0, 1, (10, 10, 4), np.uint8), 1),
    (spaces.Box(np.zeros((10, 10, 4), bool), np.ones((10, 10, 4), bool), dtype=bool), 3),
    (spaces.Box(0, 1, (35, 50)), 2),
    (spaces.Box(-1, 1, (5,)), 3),
    (spaces.Box(-1, 1, ()), 3),
    (spaces.Box(-1, 1, (2, 3, 2, 2), np.float64), 2),
    (spaces.Discrete(6), 1),
    (spaces.Discrete(6, start=-3, dtype=np.int32), 3),
    (spaces.MultiDiscrete([3, 4]), 2),
    (spaces.MultiBinary(7), 2),
    (spaces.MultiBinary([2, 3]), 1),
    (spaces.Dict(PARTS), 1),
    (spaces.Tuple(list(PARTS.values())), 1),
]


def random_rows(space: spaces.Space, T: int, B: int):
    """(T, B, ...) samples of a space, as tensors."""
    space.seed(0)
    samples = [[space.sample() for _ in range(B)] for _ in range(T)]

    def stacked(path, part):
        if isinstance(part, (spaces.Dict, spaces.Tuple)):
            keys = part.spaces if isinstance(part, spaces.Dict) else range(len(part.spaces))
            parts = {key: stacked([*path, key], part.spaces[key]) for key in keys}
            return parts if isinstance(part, spaces.Dict) else tuple(parts.values())

        def leaf(sample):
            for key in path:
                sample = sample[key]
            return sample

        return torch.from_numpy(np.array([[leaf(s) for s in row] for row in samples], part.dtype))

    return stacked([], space)


@pytest.mark.parametrize("space, frame_stack", OBSERVATIONS, ids=str)
@pytest.mark.parametrize("dueling", [False, True])
def test_t_steps_at_once_are_t_steps_one_by_one(space, frame_stack, dueling):
    T, B = 5, 2
    torch.manual_seed(0)
    config = ModelConfig(frame_stack, features=32, hidden=(16, 16), dueling=dueling)
    model = config(space, spaces.Discrete(3)).eval()
    obs = random_rows(space, T, B)
    first = torch.tensor([[1, 1], [0, 0], [0, 1], [0, 0], [1, 0]], dtype=torch.bool)
    start = model.initial_state(B)
    with torch.no_grad():
        outputs, end = model(obs, first, start)
        q, state = outputs["q"], start
        assert q.shape == (T, B, 3) and q.dtype == torch.float32
        assert (q.std(0) > 0).all()  # the observation matters
        for t in range(T):
            row = tree_map(lambda part, t=t: part[t : t + 1], obs)
            outputs, state = model(row, first[t : t + 1], state)
            torch.testing.assert_close(outputs["q"][0], q[t], rtol=1e-4, atol=1e-6)
    assert set(state) == set(end) == set(start) == ({"frames"} if frame_stack > 1 else set())
    for name, part in start.items():  # what the wire is laid out for is what comes
        assert part.shape == state[name].shape == (B, frame_stack - 1, *space.shape)
        assert part.dtype == state[name].dtype == obs.dtype
        assert torch.equal(state[name], end[name])


@pytest.mark.parametrize("size", [(36, 44), (9, 8)])
def test_an_image_is_the_same_with_its_colours_first_or_last(size):
    networks, images = [], torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (4, 2, *size, 3), np.uint8)
    )  # fmt: skip
    for shape in ((*size, 3), (3, *size)):
        torch.manual_seed(0)
        space = spaces.Box(0, 255, shape, np.uint8)
        networks.append(ModelConfig(2, features=32)(space, spaces.Discrete(3)))
    first = torch.zeros(4, 2, dtype=torch.bool)
    first[0] = True
    last, _ = networks[0](images, first, networks[0].initial_state(2))
    front, _ = networks[1](images.movedim(-1, 2), first, networks[1].initial_state(2))
    torch.testing.assert_close(last["q"], front["q"])


def test_large_images_get_three_convolutions_small_ones_one():
    for side, torso in ((36, NatureTorso), (35, SmallImageTorso)):
        model = ModelConfig(features=8)(
            spaces.Box(0, 255, (84, side), np.uint8), spaces.Discrete(2)
        )
        assert type(model.encoder.torso) is torso
    white = torch.full((1, 1, 84, 84), 255, dtype=torch.uint8)
    first = torch.ones(1, 1, dtype=torch.bool)
    grey = ModelConfig(features=8)(GREY, spaces.Discrete(2))
    seen, plain = [], NatureTorso(1, 84, 84)
    plain.load_state_dict(grey.encoder.torso.state_dict())
    grey.encoder.torso.register_forward_hook(lambda *call: seen.append(call[-1]))
    grey(white, first, {})
    torch.testing.assert_close(seen[0], plain(torch.ones(1, 1, 84, 84)))  # bytes count as 0 to 1


def test_dueling_advantages_have_mean_zero():
    torch.manual_seed(0)
    stream, features = StreamConfig(8, hidden=6), torch.randn(20, 8)
    head = QHead(stream, spaces.Discrete(5), dueling=True)
    q = head(features)["q"]
    torch.testing.assert_close(q.mean(1, keepdim=True), head.value(features))
    advantage = head.advantage(features)
    torch.testing.assert_close(q[:, :1] - q, advantage[:, :1] - advantage)
    plain = QHead(stream, spaces.Discrete(5), dueling=False)
    assert torch.equal(plain(features)["q"], plain.advantage(features))


def weights_of(space: spaces.Space, **options) -> list[tuple[int, ...]]:
    """Shapes of the matrices of a net of five actions, convolutions left out."""
    model = ModelConfig(features=32, hidden=(16, 8), **options)(space, spaces.Discrete(5))
    return [tuple(p.shape) for name, p in model.named_parameters() if p.ndim == 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(32, 1152), (5, 32)]),
        ({"dueling": True}, [(32, 1152), (5, 32), (32, 1152), (1, 32)]),
        ({"dueling": True, "head": C51(3, 0, 1)}, [(32, 1152), (15, 32), (32, 1152), (3, 32)]),
        ({"head": IQN(2, 2)}, [(1152, 64), (32, 1152), (5, 32)]),
        ({"dueling": True, "head": IQN(2, 2)},
         [(1152, 64), (32, 1152), (5, 32), (32, 1152), (1, 32)]),
        ({"dueling": True, "lstm": 4},
         [(32, 1152), (16, 32), (16, 4), (32, 4), (5, 32), (32, 4), (1, 32)]),
    ],
)  # fmt: skip
def test_each_stream_has_the_last_hidden_layer_for_itself(options, expected):
    image = spaces.Box(0, 255, (8, 9), np.uint8)  # 16 channels of one 3 x 3 convolution
    assert weights_of(image, **options) == expected


def test_streams_of_several_parts_have_one_layer_behind_all_of_them():
    image, vector = spaces.Box(0, 255, (8, 9), np.uint8), spaces.Box(0, 1, (3,))
    space = spaces.Dict({"a": image, "b": vector})
    assert weights_of(space) == [(32, 1152), (16, 3), (8, 16), (5, 40)]
    together = (40, 1152 + 16)
    assert weights_of(space, dueling=True) == [(16, 3), together, (5, 40), together, (1, 40)]


def test_streams_of_an_mlp_have_its_last_layer_each():
    vector = spaces.Box(-1, 1, (3,))
    assert weights_of(vector) == [(16, 3), (8, 16), (5, 8)]
    assert weights_of(vector, dueling=True) == [(16, 3), (8, 16), (5, 8), (8, 16), (1, 8)]
    bare = ModelConfig(hidden=(), dueling=True)(vector, spaces.Discrete(5))
    assert bare(torch.rand(2, 1, 3), torch.ones(2, 1), {})[0]["q"].shape == (2, 1, 5)


def test_axes_of_channels():
    for shape, last in (
        ((84, 84, 3), True), ((3, 84, 84), False), ((210, 160, 3), True), ((3, 210, 160), False),
        ((17, 9, 9), False), ((9, 9, 17), True), ((8, 8, 8), False), ((9, 8), False),
    ):  # fmt: skip
        assert has_channels_last(shape) == last, shape


def test_categories_of_an_observation_are_one_hot():
    space = spaces.MultiDiscrete([2, 3], start=[5, -1])
    model = ModelConfig(hidden=(4,))(space, spaces.Discrete(2))
    seen = []
    model.encoder.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([[[5, -1]], [[6, 1]]]), torch.ones(2, 1), {})
    assert seen[0].tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1]]


def test_options_that_nothing_would_heed_are_refused():
    with pytest.raises(ValueError, match="expected an image for the torso impala"):
        ModelConfig(torso="impala")(spaces.Box(-1, 1, (3,)), spaces.Discrete(2))
    with pytest.raises(ValueError, match="dueling=True with a Q head only"):
        ModelConfig(dueling=True, head="actor_critic")


# -- LSTM ----------------------------------------------------------------------------------------

VECTOR = spaces.Box(-1, 1, (5,))


def actor_critic(observation_space=VECTOR, action_space=None, seed: int = 0, **changes) -> Network:
    torch.manual_seed(seed)
    config = ModelConfig(features=32, hidden=(16, 16), head="actor_critic", **changes)
    return config(observation_space, spaces.Discrete(3) if action_space is None else action_space)


def random_first(T: int, B: int, probability: float = 0.15) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(T, B, generator=generator) < probability


@pytest.mark.parametrize(
    "space, frame_stack",
    [(VECTOR, 1), (VECTOR, 3), (spaces.Box(0, 255, (36, 40), np.uint8), 2),
     (spaces.Dict(PARTS), 1), (spaces.Tuple(list(PARTS.values())), 1)],
    ids=str,
)  # fmt: skip
def test_an_lstm_at_once_is_the_lstm_in_pieces_and_step_by_step(space, frame_stack):
    T, B, H = 24, 4, 6
    model = actor_critic(space, frame_stack=frame_stack, lstm=H)
    obs, first = random_rows(space, T, B), random_first(T, B)
    assert 5 < first.any(1).sum() < T - 5 and not first[0].all()
    start = model.initial_state(B)
    shapes = {"h": (B, H), "c": (B, H)}
    shapes |= {"frames": (B, frame_stack - 1, *space.shape)} if frame_stack > 1 else {}
    assert {name: tuple(part.shape) for name, part in start.items()} == shapes
    start["h"], start["c"] = torch.rand(B, H) - 0.5, torch.rand(B, H) - 0.5
    want, end = model(obs, first, start)
    for lengths in ([1] * T, [7, 5, 12]):
        state, begin, pieces = start, 0, []
        for length in lengths:
            rows = slice(begin, begin + length)
            piece = tree_map(lambda part, rows=rows: part[rows], obs)
            with torch.inference_mode(mode=length == 1):  # as actors call it
                outputs, state = model(piece, first[rows], state)
            pieces.append(outputs)
            begin += length
        whole = {name: torch.cat([piece[name] for piece in pieces]) for name in want}
        assert set(state) == set(end) == set(start)
        for got, expected in ((whole, want), (state, end)):
            for name, part in got.items():
                torch.testing.assert_close(part, expected[name], rtol=0, atol=1e-6)
    assert want["value"].shape == (T, B) and want["logits"].shape == (T, B, 3)
    assert all(end[name].shape == (B, H) and end[name].dtype == torch.float32 for name in "hc")


def test_first_cuts_the_memory_and_nothing_else_does():
    T, B, H = 12, 3, 4
    core = LSTM(5, H)
    first = torch.zeros(T, B, dtype=torch.bool)
    cuts = [0, 5, None]  # the last environment goes on all the time
    first[0, 0] = first[5, 1] = True
    features, start = torch.randn(T, B, 5), {name: torch.randn(B, H) for name in "hc"}
    before, end = core(features, first, start)
    for env, cut in enumerate(cuts):
        other, state = features.clone(), {name: part.clone() for name, part in start.items()}
        other[: 2 if cut is None else cut, env] = torch.randn(5)
        for part in state.values():
            part[env] = torch.randn(H) if cut is None else torch.nan  # a sick memory dies too
        after, last = core(other, first, state)
        others = [b for b in range(B) if b != env]
        assert torch.equal(after[:, others], before[:, others])
        if cut is None:
            assert (after[:, env] != before[:, env]).any(1).all()
            assert (last["c"][env] != end["c"][env]).any()
        else:
            assert torch.equal(after[cut:, env], before[cut:, env])
            assert torch.equal(last["h"][env], end["h"][env])
            assert torch.equal(last["c"][env], end["c"][env])
    features.requires_grad_()  # and no gradient goes back over a cut
    core(features, first, start)[0][-1].sum().backward()
    flows = features.grad.abs().sum(2) > 0
    assert flows[:, 2].all() and flows[:, 0].all()
    assert flows[5:, 1].all() and not flows[:5, 1].any()


def test_the_lstm_is_called_once_for_each_long_stretch_without_a_cut():
    core, calls = LSTM(5, 4), []
    core.lstm.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    features, first = torch.randn(40, 3, 5), torch.zeros(40, 3, dtype=torch.bool)
    core(features, first, core.initial_state(3))
    assert calls == [40]
    calls.clear()
    first[0], first[17, 1], first[17, 2], first[39, 0] = True, True, True, True
    core(features, first, core.initial_state(3))
    assert calls == [17, 22, 1]


def test_short_stretches_of_an_lstm_row_by_row_are_the_calls_of_torchs():
    T, B, H, rows = 30, 3, 6, [4, 11, 30]
    torch.manual_seed(0)
    core, calls, found = LSTM(5, H), [], []
    core.lstm.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.nn.init.normal_(core.lstm.bias_hh_l0)  # both biases count
    features, first = torch.randn(T, B, 5), random_first(T, B)
    state = {name: torch.randn(B, H) for name in "hc"}
    for core.LONG in (0, T + 1):
        output, states = core.states(features, first, state, rows)
        loss = output.square().sum() + sum(part.sum() for one in states for part in one.values())
        found.append([output, *torch.autograd.grad(loss, core.parameters())])
        found[-1] += [one[name] for one in states for name in "hc"]
        assert len(calls) > 10
    assert len(calls) < T
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frame_stack", [1, 2])
def test_the_states_before_rows_are_those_of_a_model_called_in_pieces(frame_stack):
    """By one call of a network, and by several of a model that has no `states`."""
    T, B, rows = 13, 3, (2, 3, 9, 12)
    torch.manual_seed(0)
    model = ModelConfig(frame_stack, hidden=(16,), lstm=6)(VECTOR, spaces.Discrete(3))
    obs, first = random_rows(VECTOR, T, B), random_first(T, B)
    assert first[3:].any() and first[list(rows)].any()
    start = tree_map(lambda part: torch.rand_like(part) - 0.5, model.initial_state(B))
    outputs, states = states_before(model, obs, first, start, rows)
    whole, end = model(obs, first, start)
    assert torch.equal(whole["q"], model.states(obs, first, start, ())[0]["q"])
    torch.testing.assert_close(outputs["q"], whole["q"])
    assert set(states) == {"h", "c"}
    for k, row in enumerate(rows):
        _, want = model(obs[:row], first[:row], start)
        for name in "hc":
            torch.testing.assert_close(states[name][k], want[name])
    outputs, again = states_before(Plain(model), obs, first, start, rows)
    torch.testing.assert_close(outputs["q"], whole["q"])
    for name in "hc":
        torch.testing.assert_close(again[name], states[name])
    assert set(again) == set(states) and set(end) == set(start)


class Plain(torch.nn.Module):
    """A user's model: nothing but the contract."""

    def __init__(self, model: Network):
        super().__init__()
        self.model = model

    def forward(self, obs, first, state):
        return self.model(obs, first, state)


def test_an_lstm_serves_a_q_head_and_computes_in_float32():
    torch.manual_seed(0)
    model = ModelConfig(hidden=(16,), lstm=6)(VECTOR, spaces.Discrete(3))
    obs, first = random_rows(VECTOR, 7, 2), random_first(7, 2)
    seen, run = [], model.lstm.states

    def watched(*inputs):
        seen.append((inputs[:3], run(*inputs)))
        return seen[-1][1]

    model.lstm.states = watched
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = model(obs, first, model.initial_state(2))
    model.lstm.states = run
    assert outputs["q"].shape == (7, 2, 3) and outputs["q"].dtype == torch.float32
    inputs, (features, _) = seen[0]
    assert torch.equal(inputs[0], inputs[0].bfloat16().float())  # the torso did save bits
    alone, after = model.lstm(*inputs)
    assert torch.equal(features, alone)
    assert all(torch.equal(state[name], after[name]) for name in "hc")


# -- heads ---------------------------------------------------------------------------------------

SPLIT = spaces.MultiDiscrete([2, 4, 3], start=[0, 5, -1])
ARM = spaces.Box(np.array([-2, 0, -np.inf], np.float32), np.array([2, 0.5, np.inf], np.float32))
GAUSSIAN = ("mean", "log_std", "low", "high")
DISTRIBUTIONS = [
    (spaces.Discrete(5, start=3), {"logits": (5,)}),
    (SPLIT, {"logits": (3, 4)}),
    (spaces.MultiBinary(6), {"logits": (6, 2)}),
    (ARM, dict.fromkeys(GAUSSIAN, (3,))),
    (spaces.Box(-1, 1, (2, 3), np.float64), dict.fromkeys(GAUSSIAN, (2, 3))),
    (spaces.Box(-1, 1, ()), dict.fromkeys(GAUSSIAN, ())),
]


@pytest.mark.parametrize("space, shapes", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("options", [{}, {"shared": False}, {"lstm": 8}], ids=str)
def test_what_an_actor_critic_puts_out(space, shapes, options):
    T, B = 4, 3
    model = actor_critic(action_space=space, **options)
    obs, first = random_rows(VECTOR, T, B), random_first(T, B)
    outputs, _ = model(obs, first, model.initial_state(B))
    shapes = {"value": (), **shapes}
    assert {name: tuple(part.shape) for name, part in outputs.items()} == {
        name: (T, B, *shape) for name, shape in shapes.items()
    }
    assert all(part.dtype == torch.float32 for part in outputs.values())
    for name in ("value", "logits", "mean"):  # the observation matters
        assert name not in outputs or (outputs[name][..., :1].std(0) > 0).all()


@pytest.mark.parametrize("counts", [[2, 4, 3], [1, 5], [3]])
def test_absent_categories_are_impossible_and_teach_nothing(counts):
    torch.manual_seed(0)
    head = ActorCriticHead(8, spaces.MultiDiscrete(counts))
    features = torch.randn(10, 8)
    outputs = head(features)
    flat = head.policy.layer(features)
    assert flat.shape == (10, sum(counts))
    begins = np.cumsum([0, *counts])
    for d, (begin, end) in enumerate(pairwise(begins)):
        assert torch.equal(outputs["logits"][:, d, : counts[d]], flat[:, begin:end])
        assert (outputs["logits"][:, d, counts[d] :] == -torch.inf).all()
    probability = outputs["logits"].softmax(2)
    torch.testing.assert_close(probability.sum(2), torch.ones(10, len(counts)))
    probability[:, 0, 0].sum().backward()
    slopes = head.policy.layer.weight.grad.abs().sum(1)
    assert slopes.isfinite().all() and (slopes[counts[0] :] == 0).all()
    assert (slopes[: counts[0]] > 0).all() or counts[0] == 1


def test_a_gaussian_carries_the_bounds_of_its_actions():
    model = actor_critic(action_space=ARM, initial_log_std=-0.5)
    obs, first = random_rows(VECTOR, 4, 3), random_first(4, 3)
    outputs, _ = model(obs, first, {})
    assert torch.equal(outputs["low"], torch.tensor([-2, 0, -torch.inf]).expand(4, 3, 3))
    assert torch.equal(outputs["high"], torch.tensor([2, 0.5, torch.inf]).expand(4, 3, 3))
    assert torch.equal(outputs["log_std"], torch.full((4, 3, 3), -0.5))
    trained, kept = dict(model.named_parameters()), dict(model.named_buffers())
    assert [name for name in trained if name.endswith("log_std")]
    bounds = [tensor for name, tensor in kept.items() if name.endswith((".low", ".high"))]
    assert len(bounds) == 2 and not set(kept) & set(trained)
    bounds[0].fill_(7)  # weights are copied into a model in place: the space is not its memory
    assert ARM.low[0] == -2
    weight = torch.randn(4, 3, 3)
    (outputs["log_std"] * weight).sum().backward()
    torch.testing.assert_close(model.head.policy.log_std.grad, weight.sum((0, 1)))


def test_the_last_layers_begin_small_for_the_policy_and_at_one_for_the_value():
    model = actor_critic(action_space=spaces.Discrete(4), lstm=6)
    policy, value = model.head.policy.layer, model.head.value
    torch.testing.assert_close(policy.weight @ policy.weight.T, 1e-4 * torch.eye(4))
    torch.testing.assert_close(value.weight.norm(), torch.ones(()))
    recurrent = model.lstm.lstm.weight_hh_l0  # (4H, H)
    torch.testing.assert_close(recurrent.T @ recurrent, torch.eye(6), rtol=0, atol=1e-5)
    assert not any(bias.any() for bias in (value.bias, policy.bias, model.lstm.lstm.bias_hh_l0))
    i, f, g, o = model.lstm.lstm.bias_ih_l0.chunk(4)
    assert (f == 1).all() and not any(bias.any() for bias in (i, g, o))  # it remembers


@pytest.mark.parametrize("space", [VECTOR, spaces.Box(0, 255, (36, 36), np.uint8)], ids=str)
def test_two_torsos_learn_apart_and_one_together(space):
    obs, first = random_rows(space, 3, 2), random_first(3, 2)
    for shared in (True, False):
        model = actor_critic(space, shared=shared)
        for name in ("logits", "value"):
            model.zero_grad()
            outputs, _ = model(obs, first, {})
            outputs[name].square().sum().backward()
            moved = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
            torso = "encoder" if shared or name == "logits" else "value_encoder"
            assert moved == {torso, "head"}
    one, two = model.encoder.parameters(), model.value_encoder.parameters()
    assert any((a != b).any() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name, function", [("relu", np.maximum), ("tanh", np.tanh)])
def test_the_mlp_by_hand(name, function):
    model = actor_critic(activation=name)
    obs = random_rows(VECTOR, 1, 6)
    features = obs[0].double().numpy()
    for weight, bias in zip(*[iter(model.encoder.parameters())] * 2, strict=True):
        features = features @ weight.detach().double().numpy().T + bias.detach().numpy()
        features = function(features, 0) if name == "relu" else function(features)
    value = features @ model.head.value.weight.detach().double().numpy()[0]
    got = model(obs, torch.ones(1, 6, dtype=torch.bool), {})[0]["value"][0]
    np.testing.assert_allclose(got.detach().numpy(), value, rtol=1e-5, atol=1e-6)
    if name == "tanh":
        tree = actor_critic(spaces.Dict(PARTS), activation="tanh")
        kinds = [type(module) for module in tree.encoder.parts[1].modules()]
        assert torch.nn.Tanh in kinds and torch.nn.ReLU not in kinds


# -- normalisers ---------------------------------------------------------------------------------


def batches(shape: tuple[int, ...], seed: int = 0):
    """(rows (T, B, *shape), valid (T, B)) of different sizes, scales and shares of valid rows."""
    rng = np.random.default_rng(seed)
    for T, B, share in ((5, 3, 0.7), (1, 1, 1.0), (40, 2, 0.5), (4, 4, 0.0), (16, 8, 1.0)):
        rows = rng.normal(rng.normal(0, 50), rng.uniform(1, 20), (T, B, *shape))
        rows[..., :1] += 1e4  # far from 0, where sums of squares lose their digits
        yield rows.astype(np.float32), rng.random((T, B)) < share


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 1, 2)])
def test_running_statistics_are_those_of_all_valid_rows_at_once(shape):
    statistics, seen = RunningStatistics(shape), np.zeros((0, *shape))
    for rows, valid in batches(shape):
        rows[~valid] = np.nan  # never looked at
        statistics.update(torch.from_numpy(rows), torch.from_numpy(valid))
        seen = np.concatenate([seen, rows[valid].astype(np.float64)])
        np.testing.assert_allclose(statistics.mean.numpy(), seen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.variance.numpy(), seen.var(0), rtol=1e-9, atol=1e-9)
        assert statistics.count == len(seen)
    before = flatten(statistics.state_dict())[0]
    sick = torch.full((1, 2, *shape), torch.inf)
    statistics.update(sick, torch.ones(1, 2, dtype=torch.bool))
    after = flatten(statistics.state_dict())[0]
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["left|right", "50%", "%7C|%25", "|"])
def test_any_name_of_a_part_survives_being_saved(name):
    tree = {"model": {f"encoder.{name}.weight": torch.ones(2), name: {name: 3.0}}}
    arrays, numbers = flatten(tree)
    again = unflatten(arrays | numbers)
    assert again["model"][name] == {name: 3.0}
    assert torch.equal(again["model"][f"encoder.{name}.weight"], torch.ones(2))


def test_nothing_seen_is_mean_0_and_variance_1():
    statistics = RunningStatistics((2,))
    statistics.update(torch.ones(3, 1, 2), torch.zeros(3, 1, dtype=torch.bool))
    assert torch.equal(statistics.mean, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(statistics.variance, torch.ones(2, dtype=torch.float64))


def test_behind_the_horizon_old_rows_fade():
    statistics, valid = RunningStatistics((), horizon=30), torch.ones(10, 1, dtype=torch.bool)
    mean = square = 0.0
    for i in range(12):
        statistics.update(torch.full((10, 1), float(i)), valid)
        share = 10 / min(10 * (i + 1), 40)  # of 30 old rows and 10 new ones
        mean, square = mean + share * (i - mean), square + share * (i * i - square)
    np.testing.assert_allclose(statistics.mean.item(), mean)
    np.testing.assert_allclose(statistics.variance.item(), square - mean**2)
    assert statistics.count == 30 and mean > 6


@pytest.mark.parametrize(
    "space, frame_stack",
    [(spaces.Box(-1e9, 1e9, (4,)), 1), (spaces.Box(-1e9, 1e9, (4,), np.float64), 3),
     (spaces.Box(0, 255, (4,), np.uint8), 2)],
    ids=str,
)  # fmt: skip
def test_a_network_sees_its_observations_normalised(space, frame_stack):
    model = actor_critic(space, frame_stack=frame_stack, normalize_obs=True, lstm=5)
    plain_space = spaces.Box(-10, 10, (4,))
    plain = actor_critic(plain_space, frame_stack=frame_stack, lstm=5)
    plain.load_state_dict(
        {name: part for name, part in model.state_dict().items() if "normalizer" not in name}
    )
    seen = []
    for rows, valid in batches((4,)):
        rows = np.abs(rows).astype(space.dtype)
        model.update_statistics(torch.from_numpy(rows), torch.from_numpy(valid))
        seen += [rows[valid]]
    seen = np.concatenate(seen).astype(np.float64)
    rows[0, 0] = 0 if space.dtype == np.uint8 else -1e9  # an outlier
    scaled = (rows.astype(np.float64) - seen.mean(0)) / seen.std(0)
    assert np.abs(scaled).max() > 10 or space.dtype == np.uint8
    scaled = torch.from_numpy(scaled.clip(-10, 10).astype(np.float32))
    first = random_first(*valid.shape)
    first[0] = True  # or the stack would begin with raw zeros here and scaled ones there
    before = flatten(model.state_dict())[0]
    before = {name: part.copy() for name, part in before.items()}
    got, state = model(torch.from_numpy(rows), first, model.initial_state(valid.shape[1]))
    want, _ = plain(scaled, first, plain.initial_state(valid.shape[1]))
    for name in ("value", "logits"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    if frame_stack > 1:  # the replay and the wire know the environment's frames only
        assert torch.equal(state["frames"][:, -1], torch.from_numpy(rows[-1]))
    after = flatten(model.state_dict())[0]
    assert all(np.array_equal(before[n], after[n]) for n in before)  # calling moves nothing


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), SPLIT, ARM], ids=str)
def test_all_a_model_knows_goes_to_actors_and_through_checkpoints(action_space):
    options = {"normalize_obs": True, "normalize_returns": True, "lstm": 5, "frame_stack": 2}
    learner = actor_critic(action_space=action_space, **options)
    for rows, valid in batches((5,)):
        learner.update_statistics(torch.from_numpy(rows), torch.from_numpy(valid))
        learner.renormalize(torch.from_numpy(rows[..., 0]), torch.from_numpy(valid))
    obs, first = torch.from_numpy(rows), torch.from_numpy(valid)
    published = {n: np.array(part.detach().numpy()) for n, part in learner.state_dict().items()}
    actor = actor_critic(action_space=action_space, seed=1, **options)
    with torch.no_grad():
        for name, tensor in actor.state_dict().items():
            tensor.copy_(torch.from_numpy(published[name]))
    resumed = actor_critic(action_space=action_space, seed=2, **options)
    arrays, numbers = flatten({"model": learner.state_dict()})
    resumed.load_state_dict(unflatten(arrays | numbers)["model"])
    start = learner.initial_state(valid.shape[1])
    with torch.inference_mode():
        want, _ = learner(obs, first, start)
        for other in (actor, resumed):
            got, _ = other(obs, first, start)
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert other.return_scale == learner.return_scale != 1


# -- PopArt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shared": False}, {"lstm": 5}], ids=str)
def test_popart_moves_its_statistics_and_not_its_outputs(options):
    model = actor_critic(normalize_returns=True, **options)
    obs, first = random_rows(VECTOR, 6, 4), random_first(6, 4)
    start = model.initial_state(4)
    before, _ = model(obs, first, start)
    assert model.return_scale == 1
    torch.testing.assert_close(  # to begin with it is the layer it would be without
        before["value"], actor_critic(**options)(obs, first, start)[0]["value"], rtol=0, atol=1e-6
    )
    seen, scales = np.zeros(0), [1.0]
    rng = np.random.default_rng(0)
    for mean, deviation, share in ((3, 0.5, 1), (-40, 20, 0.5), (0, 1e-3, 0.8), (9, 9, 0)):
        target = rng.normal(mean, deviation, (50, 4)).astype(np.float32)
        valid = rng.random((50, 4)) < share
        target[~valid] = np.nan
        model.renormalize(torch.from_numpy(target), torch.from_numpy(valid))
        seen = np.concatenate([seen, target[valid].astype(np.float64)])
        after, _ = model(obs, first, start)
        for name in before:
            torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(model.return_scale.item(), seen.std(), rtol=1e-6)
        np.testing.assert_allclose(model.head.value.statistics.mean.item(), seen.mean())
        scales.append(model.return_scale.item())
    assert scales[0] != scales[1] != scales[2] != scales[3] == scales[4]  # nothing valid at last
    # What the layer itself puts out, and so what is learned, is of the size of 1.
    value = model.head.value
    features = torch.randn(7, value.layer.in_features)
    inner = (value(features) - seen.mean()) / seen.std()
    torch.testing.assert_close(value.layer(features), inner.float(), rtol=1e-4, atol=1e-4)


def test_returns_that_never_change_blow_nothing_up():
    torch.manual_seed(0)
    layer, features = PopArt(torch.nn.Linear(3, 1)), torch.randn(20, 3)
    before = layer(features)
    layer.renormalize(torch.full((4, 2), 5.0), torch.ones(4, 2, dtype=torch.bool))
    assert layer.scale == 1e-4
    torch.testing.assert_close(layer(features), before, rtol=1e-5, atol=1e-5)


def test_without_normalisers_nothing_moves():
    model = actor_critic()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    valid = torch.ones(4, 2, dtype=torch.bool)
    model.update_statistics(torch.randn(4, 2, 5), valid)
    model.renormalize(torch.randn(4, 2), valid)
    assert model.return_scale == 1
    after = model.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


# -- what cannot be ------------------------------------------------------------------------------


def test_half_a_float_is_too_few_for_an_action():
    """Rounded, it is not the one whose log-probability was worked out."""
    half = spaces.Box(-1, 1, (2,), np.float16)
    with pytest.raises(ValueError, match="expected actions of float32 or float64, got Box"):
        try_model(ModelConfig(head="actor_critic")(VECTOR, half), "actor_critic", VECTOR, half)


def test_refusals():
    for space, frame_stack in ((spaces.Dict(PARTS), 2), (GREY, 0)):
        with pytest.raises(ValueError, match=f"frame_stack >= 1, .* got {frame_stack} for"):
            ModelConfig(frame_stack)(space, spaces.Discrete(2))
    with pytest.raises(ValueError, match="expected a Discrete action space for a Q head, got Box"):
        ModelConfig()(MATRIX, MATRIX)
    for options in ({"head": "critic"}, {"activation": "gelu"}, {"lstm": -1}):
        with pytest.raises(ValueError, match=r"expected head of .*'tanh'.* and lstm >= 0, got"):
            ModelConfig(**options)
    with pytest.raises(ValueError, match="shared=True with an LSTM, got shared=False and lstm=8"):
        ModelConfig(lstm=8, shared=False)
    for space in (GREY, MATRIX, spaces.Discrete(3), spaces.Dict(PARTS), spaces.MultiBinary(4)):
        with pytest.raises(ValueError, match=r"expected a Box that is no image .* got"):
            actor_critic(space, normalize_obs=True)
    for name, value in (("normalize_obs", True), ("normalize_returns", True), ("shared", False)):
        for head in ("auto", "q"):
            with pytest.raises(ValueError, match=f'only with head="actor_critic", .*{head}'):
                ModelConfig(head=head, **{name: value})(VECTOR, spaces.Discrete(2))
    statistics, valid = RunningStatistics((5,)), torch.ones(3, 2, dtype=torch.bool)
    for shape in ((4, 2, 5), (3, 2), (3, 2, 4)):
        with pytest.raises(ValueError, match=r"expected rows of shape \(3, 2, 5\), .* got"):
            statistics.update(torch.zeros(shape), valid)


@pytest.mark.parametrize(
    "space",
    [spaces.MultiDiscrete([[2, 3], [4, 5]]), spaces.MultiBinary([2, 3]), spaces.Dict(PARTS),
     spaces.Box(0, 9, (2,), np.int64), spaces.Tuple([spaces.Discrete(2)])],
    ids=str,
)  # fmt: skip
def test_action_spaces_without_a_distribution_are_refused(space):
    with pytest.raises(ValueError, match=r"expected an action space of Discrete, .* got"):
        actor_critic(action_space=space)


@pytest.mark.parametrize("low, high", [(1.0, 1.0), (-3.4e38, 3.4e38)])
def test_bounds_that_leave_no_density_are_refused(low, high):
    bounds = np.array([-1, low], np.float32), np.array([1, high], np.float32)
    with pytest.raises(ValueError, match="expected low < high and a finite high - low"):
        actor_critic(action_space=spaces.Box(*bounds))


def test_the_mean_of_a_bounded_action_stays_where_a_float_tells_its_u():
    """Far out the score of what was drawn, u - mean, would be wrong: it must be 0 on average."""
    space = spaces.Box(np.float32([-2, -np.inf]), np.float32([2, np.inf]))
    head = Gaussian(1, space, 0.0)
    with torch.no_grad():
        head.layer.weight.fill_(1.0)
    outputs = head(torch.tensor([[0.01], [50.0], [-50.0]]))
    bounded, free = outputs["mean"].unbind(1)
    assert free.tolist() == pytest.approx([0.01, 50.0, -50.0])
    assert bounded.tolist() == pytest.approx([0.01, 4.0, -4.0], rel=1e-3)
    outputs = {name: part[1].expand(200_000, 2) for name, part in outputs.items()}
    outputs["value"] = torch.zeros(200_000)
    u = outputs["mean"] + torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    action = torch.stack([2 * torch.tanh(u[:, 0].double()), u[:, 1].double()], 1).float()
    back = unsquash(action, outputs["low"], outputs["high"])
    assert (back - outputs["mean"]).mean(0).abs().max() < 0.01


def test_a_discrete_observation_that_does_not_start_at_0_is_tried_with_its_own_values():
    space, action_space = spaces.Discrete(4, start=3), spaces.Discrete(2)
    model = ModelConfig(hidden=(8,))(space, action_space)
    _, outputs = try_model(model, "q", space, action_space)
    assert outputs["q"].shape == (2, 3, 2) and outputs["q"].isfinite().all()


def test_a_model_that_begins_with_what_is_no_number_is_refused():
    space, action_space = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(2)
    model = ModelConfig(hidden=(8,))(space, action_space)
    try_model(model, "q", space, action_space)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite parameters, got others in .*weight"):
        try_model(model, "q", space, action_space)


class Own(torch.nn.Module):
    """Returns what it is told to."""

    def __init__(self, *returned, begins=None):
        super().__init__()
        self.returned, self.begins = returned, begins or {}
        self.weight = torch.nn.Parameter(torch.zeros(3, 4))

    def initial_state(self, num_envs):
        return self.begins

    def forward(self, obs, first, state):
        steps = [_cut(part, len(first)) for part in self.returned]
        return steps[0] if len(steps) == 1 else tuple(steps)


def _cut(outputs, steps: int):
    """As many rows of what has two."""
    return tree_map(lambda part: part[:steps], outputs) if outputs is not None else None


Q = {"q": torch.zeros(2, 3, 2), "value": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    "model, words",
    [
        (Own(Q), r"to return \(outputs, state\), got a dict; return outputs, state: a model has"),
        (Own(Q["q"]), "got a Tensor; return outputs, state"),
        (Own(Q["q"], {}), r"got a tuple of \['Tensor', 'dict'\]; return outputs"),
        (Own(Q, {}, {}), r"got a tuple of \['dict', 'dict', 'dict'\]"),
        (Own(Q, None), r"a state like the one it was given, got NoneType after \{\}"),
    ],
)
def test_a_model_that_returns_something_else_is_refused_in_words(model, words):
    spaces_ = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
    try_model(Own(Q, {}), "q", *spaces_)
    with pytest.raises(ValueError, match=words):
        try_model(model, "q", *spaces_)


def test_models_that_could_not_be_trained_are_refused():
    spaces_ = spaces.Box(-1, 1, (3,)), spaces.Discrete(2)
    learnt, frozen, named = Own(Q, {}), Own(Q, {}), Own(Q, {}, begins={"frames": torch.zeros(3, 4)})
    learnt.begins = {"h": learnt.weight}
    frozen.requires_grad_(False)
    for model, words in (
        (learnt, "to give constants, got a tensor with a gradient"),
        (frozen, "the model Own to have parameters that learn, got none"),
        (named, "expected 'frames' in the state of a model where its frame_stack is above 1"),
    ):
        with pytest.raises(ValueError, match=words):
            try_model(model, "q", *spaces_)


class FailsAtOneStep(Own):
    def forward(self, obs, first, state):
        outputs, state = super().forward(obs, first, state)
        if len(first) == 1 and not self.training:
            outputs = {name: part.squeeze(0) for name, part in outputs.items()}
        return outputs, state


def test_a_model_is_tried_with_one_step_as_actors_make_it():
    model = FailsAtOneStep(Q, {})
    with pytest.raises(ValueError, match=r"'q' of shape \(1, 3, ...\) for one step, got \(3, 2\)"):
        try_model(model, "q", spaces.Box(-1, 1, (3,)), spaces.Discrete(2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int64", "float64", "bool"])
def test_numbers_of_every_kind_are_stacked_row_by_row(dtype):
    T, B = 6, 3
    rows = torch.randint(0, 2, (T, B, 2, 2)).to(getattr(torch, dtype))
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0], first[3, 1] = True, True
    stack = FrameStack(3, (2, 2), rows.dtype)
    whole, _ = stack(rows, first, stack.initial_state(B))
    state = stack.initial_state(B)
    for t in range(T):
        row, state = stack(rows[t : t + 1], first[t : t + 1], state)
        assert torch.equal(row[0], whole[t])
