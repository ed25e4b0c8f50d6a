"""Models: the frame stack is Gymnasium's, and T steps at once are T steps one at a time."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation

from asyncrl.models import ModelConfig
from asyncrl.models.cores import FrameStack
from asyncrl.models.heads import QHead
from asyncrl.models.torsos import NatureTorso, SmallImageTorso
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
    seen = []
    grey.encoder.torso.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    grey(white, first, {})
    assert torch.equal(seen[0], torch.ones(1, 1, 84, 84))  # bytes are scaled to 0..1


def test_dueling_advantages_have_mean_zero():
    torch.manual_seed(0)
    head, features = QHead(8, spaces.Discrete(5), dueling=True), torch.randn(20, 8)
    q = head(features)["q"]
    torch.testing.assert_close(q.mean(1, keepdim=True), head.value(features))
    advantage = head.advantage(features)
    torch.testing.assert_close(q[:, :1] - q, advantage[:, :1] - advantage)
    plain = QHead(8, spaces.Discrete(5), dueling=False)
    assert torch.equal(plain(features)["q"], plain.advantage(features))


def test_refusals():
    for space, frame_stack in ((spaces.Dict(PARTS), 2), (GREY, 0)):
        with pytest.raises(ValueError, match=f"frame_stack >= 1, .* got {frame_stack} for"):
            ModelConfig(frame_stack)(space, spaces.Discrete(2))
    with pytest.raises(ValueError, match="expected a Discrete action space for a Q head, got Box"):
        ModelConfig()(MATRIX, MATRIX)
