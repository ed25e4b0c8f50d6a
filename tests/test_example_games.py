"""The example environments by hand: games whose every step was worked out before."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

import asyncrl.example_envs
from asyncrl.example_envs.gridworld import FIRE, GOAL, WALL
from asyncrl.example_envs.pixel_cartpole import CART_GREY, POLE_GREY
from asyncrl.example_envs.tiny_breakout import BALL, BRICKS, PADDLE, TRAIL

gym.register_envs(asyncrl.example_envs)


# -- CartPole from pixels ------------------------------------------------------------------------


def picture(position: float, angle: float) -> np.ndarray:
    env = gym.make("asyncrl/PixelCartPole-v1").unwrapped
    env.state = (position, 0.7, angle, -0.3)
    return env._draw()


def test_pixel_cartpole_is_cartpole_but_for_its_observation():
    whole, pixels = gym.make("CartPole-v1"), gym.make("asyncrl/PixelCartPole-v1")
    rng = np.random.default_rng(0)
    for episode in range(6):
        obs, _ = whole.reset(seed=episode)
        seen, _ = pixels.reset(seed=episode)
        ended = False
        while not ended:
            assert seen.shape == (40, 80) and seen.dtype == np.uint8
            action = int(obs @ [0.1, 0.3, 1.0, 1.0] > 0) if episode % 2 else int(rng.integers(2))
            obs, *expected = whole.step(action)
            seen, *others = pixels.step(action)
            assert others == expected
            ended = expected[1] or expected[2]


def test_the_picture_is_where_the_cart_is():
    """A pixel is 0.06 m; the cart is 0.5 m x 0.3 m and the pole 1 m, as far as they are in view."""
    for position in (-1.5, 0.0, 0.013, 0.02, 1.234):
        image = picture(position, 0.0).astype(float)
        below = image[33:34]  # below the axle: the cart alone
        column = (below.sum(0) @ np.arange(80)) / below.sum()
        assert (column - 39.5) * 0.06 == pytest.approx(position, abs=0.002)
        assert below.max() == CART_GREY
        assert below[0].sum() / CART_GREY * 0.06 == pytest.approx(0.5, abs=0.01)
        above = image[:29]  # above the cart: the pole alone, upright
        assert above.max() == POLE_GREY
        column = (above.sum(0) @ np.arange(80)) / above.sum()
        assert (column - 39.5) * 0.06 == pytest.approx(position, abs=0.002)
        # Its end, half a circle, is 1 m above the axle and 0.06 m more.
        assert (31.5 - np.nonzero(above.sum(1))[0][0]) * 0.06 == pytest.approx(1.06, abs=0.06)


def test_the_picture_mirrors_and_shows_a_tenth_of_a_pixel():
    assert np.array_equal(picture(0.4, 0.1), picture(-0.4, -0.1)[:, ::-1])
    assert picture(0.0, 0.15)[:29, 40:].sum() > 5 * picture(0.0, 0.15)[:29, :40].sum()
    assert not np.array_equal(picture(0.0, 0.0), picture(0.006, 0.0))
    assert not np.array_equal(picture(0.0, 0.0), picture(0.0, 0.006))
    assert picture(2.4, 0.2).any()  # half out of view


def test_the_picture_equals_one_of_many_samples():
    """A pixel is as bright as the share of its area that is covered, within a fifth."""
    position, angle, fine = 0.31, -0.12, 16
    offsets = (np.arange(40 * fine) + 0.5) / fine - 0.5
    y = 0.06 * (31.5 - offsets)[:, None]
    x = 0.06 * ((np.arange(80 * fine) + 0.5) / fine - 0.5 - 39.5)[None] - position
    cart = (np.abs(x) < 0.25) & (np.abs(y) < 0.15)
    along = np.clip(x * np.sin(angle) + y * np.cos(angle), 0, 1)
    pole = np.hypot(x - along * np.sin(angle), y - along * np.cos(angle)) < 0.06
    share = [
        mask.reshape(40, fine, 80, fine).mean((1, 3)) * grey
        for mask, grey in ((cart, CART_GREY), (pole, POLE_GREY))
    ]
    assert np.abs(np.maximum(*share) - picture(position, angle)).max() < 51


# -- doors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [True, False])
def test_the_remembered_door_has_the_reward(right):
    env = gym.make("asyncrl/DoorMemory-v0", num_doors=3, delay=(2, 2))
    doors = set()
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        door = int(obs.argmax())
        doors.add(door)
        assert obs.tolist() == [float(i == door) for i in range(4)]
        for row in ([0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]):
            # Whatever is tried before they open does nothing.
            obs, *others, _ = env.step(door if right else (door + 1) % 3)
            assert obs.tolist() == row and others == [0.0, False, False]
        obs, *others, _ = env.step(door if right else (door + 1) % 3)
        assert obs.tolist() == [0, 0, 0, 0] and others == [float(right), True, False]
    assert doors == {0, 1, 2}


def test_delays_are_drawn_and_blind_play_gets_a_quarter():
    env, delays, returns = gym.make("asyncrl/DoorMemory-v0"), [], []
    env.reset(seed=0)
    for _ in range(600):
        env.reset()
        steps, ended = 0, False
        while not ended:
            _, reward, ended, _, _ = env.step(2)
            steps += 1
        delays.append(steps - 2)
        returns.append(reward)
    assert set(delays) == {6, 7, 8, 9, 10}
    assert np.mean(returns) == pytest.approx(0.25, abs=0.08)


# -- gridworld -----------------------------------------------------------------------------------


def test_gridworld_by_hand():
    env = gym.make("asyncrl/GridWorld-v0", size=4, num_goals=1, num_fires=1)
    env.reset(seed=0)
    world = env.unwrapped
    world.planes[:WALL] = 0
    world.place = (1, 1)  # the upper left corner: a wall of one field is around
    world.planes[GOAL][1, 3] = world.planes[FIRE][3, 2] = 255

    def see() -> list[str]:
        """The neighbourhood as text."""
        obs = world._observation()
        assert obs.shape == (3, 3, 3) and set(np.unique(obs)) <= {0, 255} and not obs[:, 1, 1].any()
        text = np.full((3, 3), ".")
        for plane, letter in ((FIRE, "f"), (GOAL, "g"), (WALL, "#")):
            text[obs[plane] > 0] = letter
        return ["".join(row) for row in text]

    up, down, left, right = range(4)
    assert see() == ["###", "#..", "#.."]
    for action in (up, left):  # into the wall
        assert env.step(action)[1:3] == (0.0, False) and world.place == (1, 1)
    assert env.step(right)[1] == 0 and see() == ["###", "..g", "..."]
    assert env.step(down)[1] == 0 and see() == ["..g", "...", ".f."]
    assert env.step(down)[1] == -1 and world.place == (3, 2)
    # It burns elsewhere now: once in the world, and not here.
    assert (world.planes[FIRE] > 0).sum() == 1 and not world.planes[:, 3, 2].any()
    world.planes[FIRE] = 0
    assert [env.step(action)[1] for action in (right, up, up)] == [0, 0, 1]
    assert (world.planes[GOAL] > 0).sum() == 1 and not world.planes[:, 1, 3].any()


def test_gridworld_keeps_its_things_and_its_time():
    env = gym.make("asyncrl/GridWorld-v0")
    world, rng = env.unwrapped, np.random.default_rng(0)
    seen = 0
    for seed in range(20):
        env.reset(seed=seed)
        for step in range(1, 51):
            before, place = world.planes.copy(), np.array(world.place)
            action = int(rng.integers(4))
            obs, reward, terminated, truncated, _ = env.step(action)
            to = tuple(place + [(-1, 0), (1, 0), (0, -1), (0, 1)][action])
            to = tuple(place) if before[WALL][to] else to
            assert world.place == to and (terminated, truncated) == (False, step == 50)
            assert reward == (before[GOAL][to] > 0) * 1.0 - (before[FIRE][to] > 0) * 1.0
            assert ((world.planes > 0).sum((1, 2)) == [2, 4, 40]).all()
            assert not (world.planes > 0).sum(0).max() > 1  # nothing on top of another
            assert np.array_equal(
                obs, world.planes[:, to[0] - 1 : to[0] + 2, to[1] - 1 : to[1] + 2]
            )
            seen += reward != 0
    assert seen > 20


# -- breakout on ten fields ----------------------------------------------------------------------


def breakout(from_left: bool = True):
    env = gym.make("asyncrl/TinyBreakout-v0", sticky=0.0)
    for seed in range(99):
        obs, _ = env.reset(seed=seed)
        if obs[3, 0 if from_left else 9, BALL]:
            return env, obs
    raise AssertionError("never from that side")


def where(obs: np.ndarray, channel: int) -> tuple[int, int]:
    ((row, column),) = np.argwhere(obs[:, :, channel] == 255)
    return int(row), int(column)


STAY, LEFT, RIGHT = range(3)


def test_tiny_breakout_by_hand():
    env, obs = breakout()
    assert (obs[1:4, :, BRICKS] == 255).all() and (obs[..., BRICKS] > 0).sum() == 30
    assert where(obs, PADDLE) == (9, 4) and where(obs, TRAIL) == where(obs, BALL) == (3, 0)
    # Down to the right; the paddle goes one to the right, below where the ball is by then.
    path = [(4, 1), (5, 2), (6, 3), (7, 4), (8, 5)]
    actions = [RIGHT, STAY, STAY, STAY, STAY]
    # It bounces straight up-right, is turned by the wall, breaks a brick and comes down again.
    path += [(8, 6), (7, 7), (6, 8), (5, 9), (4, 9), (4, 8), (5, 7)]
    actions += [STAY] * 7
    trail = (3, 0)
    for action, place in zip(actions, path, strict=True):
        obs, reward, terminated, truncated, _ = env.step(action)
        assert where(obs, BALL) == place and where(obs, TRAIL) == trail
        assert reward == float(place == (4, 8)) and not terminated and not truncated
        trail = place
    assert where(obs, PADDLE) == (9, 5) and obs[3, 8, BRICKS] == 0
    assert (obs[..., BRICKS] > 0).sum() == 29
    # (6, 6), (7, 5), (8, 4) and past the paddle, which stands a field too far to the right.
    for place, ended in (((6, 6), False), ((7, 5), False), ((8, 4), False), ((9, 3), True)):
        obs, reward, terminated, *_ = env.step(STAY)
        assert where(obs, BALL) == place and terminated == ended and reward == 0


def test_tiny_breakout_goes_back_the_way_it_came_and_through_bricks():
    env, _ = breakout(from_left=False)
    game = env.unwrapped
    game.ball, game.down, game.right, game.paddle = (8, 5), 1, 1, 6
    obs, reward, terminated, *_ = env.step(STAY)
    assert where(obs, BALL) == (8, 6) and (game.down, game.right) == (-1, -1) and not terminated
    assert where(env.step(STAY)[0], BALL) == (7, 5)
    # Having just broken a brick it goes through the others, and turns at the ceiling.
    game.ball, game.down, game.right, game.in_bricks = (4, 3), -1, 1, True
    for place in ((3, 4), (2, 5), (1, 6), (0, 7), (0, 8)):
        obs, reward, *_ = env.step(STAY)
        assert where(obs, BALL) == place and reward == 0
    assert game.down == 1
    # In the open row above them it has left the bricks: the next one is broken.
    obs, reward, *_ = env.step(STAY)
    assert reward == 1 and where(obs, BALL) == (0, 9) and game.down == -1


def test_tiny_breakout_lays_new_bricks_and_sticks():
    env, _ = breakout()
    game = env.unwrapped
    game.bricks[:] = False
    game.bricks[2, 2] = True
    game.ball, game.down, game.right, game.paddle = (3, 1), -1, 1, 4
    assert env.step(STAY)[1] == 1 and not game.bricks.any()  # from below: (3, 2), then down
    for _ in range(5):  # (4, 3) to (8, 7)
        assert not env.step(RIGHT)[0][..., BRICKS].any()
    obs, *_ = env.step(STAY)
    assert (obs[1:4, :, BRICKS] == 255).all()
    env = gym.make("asyncrl/TinyBreakout-v0", sticky=1.0)
    env.reset(seed=0)
    assert where(env.step(LEFT)[0], PADDLE) == (9, 4)  # the last action was to stay
    env = gym.make("asyncrl/TinyBreakout-v0", sticky=0.3)
    stuck = 0
    for seed in range(400):
        env.reset(seed=seed)
        stuck += where(env.step(LEFT)[0], PADDLE) == (9, 4)
    assert stuck == pytest.approx(120, abs=45)
