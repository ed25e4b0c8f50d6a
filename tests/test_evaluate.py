"""Evaluation against environments whose every score is known; films against the games filmed."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image
from torch import nn

from asyncrl import cli
from asyncrl.checkpoint import Checkpoints
from asyncrl.disk import CheckpointError
from asyncrl.env_config import EnvConfig
from asyncrl.env_group import EnvDataError, Step
from asyncrl.envs import make_envs
from asyncrl.eval import load_weights, protocol_words, read_weights, table
from asyncrl.evaluate import EvaluationConfig, Game, first_seed, play_games, summarise
from asyncrl.models import ModelConfig
from asyncrl.video import Recorded, Recorder, Twin
from tests.counting_env import CountingEnv, length_of, reward_of, terminates


class Favourite(nn.Module):
    """Likes one action best, whatever it sees; writes down which rows opened an episode."""

    def __init__(self, num_actions: int, action: int = 0):
        super().__init__()
        self.q = nn.functional.one_hot(torch.tensor(action), num_actions).float()
        self.first: list[list[bool]] = []

    def initial_state(self, num_envs):
        return {}

    def forward(self, obs, first, state):
        self.first.append(first[0].tolist())
        return {"q": self.q.expand(*first.shape, -1)}, state


class SmallCounting(CountingEnv):
    """Counts from seeds that float32 can hold."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seed % 200)


class Walk(gym.Env):
    """Ten steps in the direction of the actions; shows its position, renders it as a colour."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode=None, interrupts=False, wrong_frames=False, breaks=None):
        self.observation_space = spaces.Box(-99, 99, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.render_mode, self.interrupts, self.wrong_frames = render_mode, interrupts, wrong_frames
        self.breaks = breaks

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.count = int(self.np_random.integers(3)), 0
        return np.array([self.position], np.float32), {}

    def step(self, action):
        self.position += int(action)
        self.count += 1
        if self.interrupts and self.count == 5 and self.np_random.integers(8) == 0:
            os.kill(os.getpid(), signal.SIGINT)
        if self.breaks and self.count == 5 and self.np_random.integers(8) == 0:
            raise self.breaks("the walk ends here")
        obs = np.array([self.position], np.float32)
        return obs, float(self.position), self.count == 10, False, {}

    def render(self):
        frame = np.full((20, 30, 3), 20 * self.position, np.uint8)
        frame[..., 1] = 20 * self.count  # no two alike: a gif would hold them as one
        return frame[..., 0] if self.wrong_frames else frame


gym.register("Walk-v0", entry_point=Walk)
gym.register("SmallCounting-v0", entry_point=SmallCounting)
WALK, COUNTING = (f"{__name__}:{name}-v0" for name in ("Walk", "SmallCounting"))


class Scripted:
    """Environments that do as they are told: rows of (reward, event) for each of them.

    Events: "" nothing, "life" a life lost, "over" or "cut" the end of a game; the next row is a
    reset step then, as it is after "life+" and "cut+", where episodes are parts of a game.
    """

    def __init__(self, *scripts):
        self.num_envs, self.rows = len(scripts), list(zip(*scripts, strict=True))

    def reset(self, seed):
        self.t, self.total, self.length = 0, np.zeros(self.num_envs), np.zeros(self.num_envs, int)
        self.ended = np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 1), np.float32)

    def send(self, action):
        pass

    def recv(self):
        reward, event = (np.array(column) for column in zip(*self.rows[self.t], strict=True))
        assert not (self.ended & ((reward != 0) | (event != ""))).any(), "a reset step does nothing"
        first, self.t = self.ended, self.t + 1
        self.total, self.length = self.total + reward, self.length + ~first
        goes_on = (event == "life+") | (event == "cut+")
        self.ended = (event == "over") | (event == "cut") | goes_on
        step = Step(
            obs=np.zeros((self.num_envs, 1), np.float32),
            first=first,
            reward=reward.astype(np.float32),
            terminated=(event == "life") | (event == "life+") | (event == "over"),
            truncated=(event == "cut") | (event == "cut+"),
            valid=~first,
            game_over=self.ended,
            goes_on=goes_on,
            episode_return=np.where(self.ended, self.total, 0).astype(np.float32),
            episode_length=np.where(self.ended, self.length, 0),
        )
        self.total, self.length = self.total * ~self.ended, self.length * ~self.ended
        return step


QUIET = (0, "")


def test_lives_add_up_to_the_score_and_games_are_counted_once():
    short = [(1, ""), (2, "life"), (4, "over"), QUIET] * 3
    long = [(1, "life"), QUIET, (8, ""), (0, "life"), (16, ""), (0, "cut"), QUIET, (32, "")]
    long += [(64, ""), (0, "over"), QUIET, QUIET]
    model = Favourite(2)
    games = play_games(model, Scripted(short, long), 3, seed=0)  # two in each environment
    assert games == [
        Game(7.0, 3, (3.0, 4.0)),
        Game(25.0, 6, (1.0, 8.0, 16.0), cut=True),
        Game(7.0, 3, (3.0, 4.0)),
        Game(96.0, 3, (96.0,)),  # by now the short one has begun a third, which does not count
    ]
    # Memory is cut where a game opens, not where a life is lost.
    opened = np.array(model.first).T
    assert np.nonzero(opened[0])[0].tolist() == [0, 4, 8]
    assert np.nonzero(opened[1])[0].tolist() == [0, 7]


def test_episodes_that_are_lives_make_one_game():
    """A life that a time limit cuts goes on in the next episode, and is still one."""
    first = [(1, ""), (2, "life+"), QUIET, (4, "over"), QUIET, (8, "life+"), QUIET, (0, "over")]
    other = [(16, "cut+"), QUIET, (32, "life+"), QUIET, (0, "cut"), QUIET, (64, "over"), QUIET]
    games = play_games(Favourite(2), Scripted(first, other), 4, seed=0)
    assert games == [
        Game(7.0, 3, (3.0, 4.0)),
        Game(48.0, 3, (48.0, 0.0), cut=True),
        Game(64.0, 1, (64.0,)),
        Game(8.0, 2, (8.0, 0.0)),
    ]
    means = summarise(games)
    assert means["eval/return"] == 127 / 4 and means["eval/episodes"] == 4
    assert means["eval/life_return"] == 127 / 7 and means["eval/life_score"] == 2 * 127 / 7


def test_every_environment_plays_as_many_games():
    envs = make_envs(EnvConfig(COUNTING), 3)
    games = play_games(Favourite(3), envs, 7, seed=5)  # rounded up: three in each
    envs.close()
    expected = []
    for env in range(3):
        identity = (first_seed(5) + env) % 200
        for episode in range(3):
            length = length_of(identity, episode)
            score = sum(reward_of(identity, episode, step) for step in range(1, length + 1))
            expected.append(Game(score, length, (score,), not terminates(identity, episode)))
    assert sorted(games) == sorted(expected)


def test_epsilon_is_the_share_of_random_actions():
    def actions(epsilon):
        taken = []
        envs = make_envs(EnvConfig(WALK), 4)
        play_games(Favourite(2, 1), envs, 40, 0, epsilon, lambda step, action: taken.extend(action))
        envs.close()
        return np.mean(taken)

    assert actions(0.0) == 1.0
    assert 0.4 < actions(1.0) < 0.6
    assert 0.85 < actions(0.2) < 0.95  # half of the random ones are the favourite


class Says(nn.Module):
    """The same outputs for every observation."""

    def __init__(self, **outputs):
        super().__init__()
        self.outputs = {name: torch.tensor(value) for name, value in outputs.items()}

    def initial_state(self, num_envs):
        return {}

    def forward(self, obs, first, state):
        outputs = {k: v.expand(*first.shape, *v.shape) for k, v in self.outputs.items()}
        return outputs, state


class Taste(gym.Env):
    """Five steps; its observations are its actions."""

    def __init__(self, space):
        self.action_space = space
        self.observation_space = spaces.Box(-99, 99, space.shape)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.count += 1
        return np.asarray(action, np.float32), 1.0, self.count == 5, False, {}


gym.register("Taste-v0", entry_point=Taste)


def tasted(space, model, epsilon, num_games=100) -> np.ndarray:
    """(N, *action): what four environments were given, reset steps left out."""
    seen = []
    envs = make_envs(EnvConfig(f"{__name__}:Taste-v0", {"space": space}), 4)
    games = play_games(
        model, envs, num_games, 0, epsilon, lambda step, action: seen.append(step.obs[step.valid])
    )
    envs.close()
    assert [game.score for game in games] == [5.0] * num_games
    return np.concatenate(seen)


def test_vectors_of_actions_are_the_best_or_random_as_a_whole():
    absent = -torch.inf
    logits = [[0.0, 1.0, 0.5], [2.0, 0.0, absent]]
    model, space = Says(logits=logits, value=0.0), spaces.MultiDiscrete([3, 2], start=[0, 4])
    assert (tasted(space, model, 0.0) == [1, 4]).all()
    actions = tasted(space, model, 0.6, 400)
    counts = np.zeros((3, 2))
    np.add.at(counts, (actions[:, 0].astype(int), actions[:, 1].astype(int) - 4), 1)
    expected = np.full((3, 2), 0.6 / 6)
    expected[1, 0] += 0.4
    assert np.abs(counts / len(actions) - expected).max() < 0.04
    flags = Says(logits=[[0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    assert (tasted(spaces.MultiBinary(3), flags, 0.0) == [1, 0, 1]).all()


def test_box_actions_are_the_middle_of_the_distribution_whatever_epsilon():
    low, high = np.float32([-1, 0, -np.inf]), np.float32([1, 10, np.inf])
    model = Says(mean=[0.5, -1.0, 7.0], log_std=[3.0] * 3, low=low, high=high, value=0.0)
    actions = tasted(spaces.Box(low, high), model, 1.0)
    middle = [np.tanh(0.5), 5 * (1 + np.tanh(-1)), 7]
    assert actions == pytest.approx(np.tile(middle, (len(actions), 1)), abs=1e-5)


class Remembers(nn.Module):
    """Goes three steps from where a game opens and then stands still: only memory tells when."""

    def initial_state(self, num_envs):
        return {"count": torch.full((num_envs,), 50.0)}

    def forward(self, obs, first, state):
        count = torch.where(first[0], 0.0, state["count"])
        q = torch.stack([torch.full_like(count, 2.5), 5 - count], -1)  # 5 - count > 2.5: go
        return {"q": q.unsqueeze(0)}, {"count": count + 1}


def test_memory_goes_from_step_to_step_and_is_cut_where_a_game_opens():
    envs = make_envs(EnvConfig(WALK), 3)
    games = play_games(Remembers(), envs, 12, seed=0, epsilon=0.0)
    envs.close()
    # Rewards are the position after each step: 1, 2, 3 and seven times 3 beyond the start.
    assert {game.score for game in games} == {27.0 + 10 * start for start in range(3)}


def test_steps_one_at_a_time_are_those_of_one_long_unroll():
    """With an LSTM: every action is the one that the whole history at once gives."""
    torch.manual_seed(0)
    walk, config, rows = Walk(), ModelConfig(hidden=(8,), lstm=16, head="actor_critic"), []
    model = config(walk.observation_space, walk.action_space).requires_grad_(False)
    for parameter in model.head.parameters():
        parameter.copy_(5 * torch.randn_like(parameter))
    envs = make_envs(EnvConfig(WALK), 4)
    play_games(model, envs, 12, 1, 0.0, lambda step, action: rows.append((step, action)))
    obs = [envs.reset(first_seed(1)), *(step.obs for step, _ in rows)][:-1]
    envs.close()
    first = [np.ones(4, bool), *(step.first for step, _ in rows)][:-1]
    obs, first, action = (np.array(part) for part in (obs, first, [a for _, a in rows]))
    outputs, _ = model(torch.tensor(obs), torch.tensor(first), model.initial_state(4))
    assert np.array_equal(outputs["logits"].argmax(-1), action)
    forgetful, _ = model(torch.tensor(obs), torch.ones_like(torch.tensor(first)),
                         model.initial_state(4))  # fmt: skip
    assert not np.array_equal(forgetful["logits"].argmax(-1), action)


def test_an_epsilon_that_is_no_share_is_refused():
    for epsilon in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"epsilon from 0 to 1, got {epsilon}"):
            EvaluationConfig(epsilon=epsilon)


def test_equal_seeds_give_equal_games_and_other_seeds_others():
    def games(seed):
        envs = make_envs(EnvConfig(WALK), 2)
        played = play_games(Favourite(2), envs, 10, seed, epsilon=0.5)
        envs.close()
        return played

    assert games(1) == games(1) != games(2)


def test_it_can_be_stopped_early():
    steps = []
    script = [(1, "over"), QUIET] * 10
    games = play_games(
        Favourite(2), Scripted(script), 10, 0, on_step=lambda *_: steps.append(1) or len(steps) == 5
    )
    assert len(steps) == 5 and games == [Game(1.0, 1, (1.0,))] * 3


def test_the_table_says_what_its_numbers_are():
    games = [Game(10.0, 100, (4.0, 6.0)), Game(20.0, 300, (5.0, 15.0)), Game(0.0, 50, (0.0,), True)]
    env = EnvConfig("ALE/Breakout-v5").resolved()
    rows = dict(table(games, env))
    assert rows["mean return"].startswith("10.00 +- 8.16 (3 games, ")
    assert rows["median"] == "10, from 0 to 20"
    assert rows["per life"] == "6.00; 2 x per life = 12.00"  # a game that was cut had fewer lives
    assert rows["length"] == "150 env steps, from 50 to 300; 1 of 3 games were cut off"
    assert rows["protocol"].startswith("classic: sticky actions 0; minimal actions; 0 to 29 no-ops")
    single = [Game(10.0, 100, (10.0,)), Game(20.0, 300, (20.0,))]
    assert "per life" not in dict(table(single, EnvConfig("CartPole-v1").resolved()))
    machado = protocol_words(EnvConfig("ALE/Pong-v5", protocol="machado").resolved())
    assert machado.startswith("machado: sticky actions 0.25; all 18 actions; 0 to 0 no-ops at")
    plain = EnvConfig("ALE/Pong-v5", protocol="none", kwargs={"repeat_action_probability": 0.1})
    assert (
        protocol_words(plain.resolved()) == "none: the environment's own rules, sticky actions 0.1"
    )
    assert summarise([]) == {}


# -- checkpoints ---------------------------------------------------------------------------------


def save(folder: Path, number: int, value: float, best: bool = False) -> Path:
    name = "weight" if best else "algorithm|model|weight"
    tensors = {name: np.full((1, 2), value, np.float32)}
    state = {"eval/env_steps": number} if best else {"env_steps": number}
    if not best:
        tensors |= {"algorithm|target|weight": np.zeros(3), "rng": np.zeros(4, np.uint8)}
    return Checkpoints(folder / "checkpoints").save(number, tensors, state, best=best)


def test_weights_of_the_newest_valid_or_the_best_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"valid newest checkpoint in .* got none"):
        read_weights(tmp_path)
    save(tmp_path, 10, 1.0)
    newest = save(tmp_path, 20, 2.0)
    with pytest.raises(CheckpointError, match="valid best checkpoint"):
        read_weights(tmp_path, "best")
    save(tmp_path, 15, 3.0, best=True)

    model = nn.Linear(2, 1, bias=False)
    for which, value, env_steps in (("newest", 2.0, 20), ("best", 3.0, 15)):
        weights = read_weights(tmp_path, which)
        load_weights(model, weights)
        assert model.weight.tolist() == [[value, value]]
        assert weights.env_steps == env_steps and weights.refused == []

    data = bytearray((newest / "tensors.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "tensors.safetensors").write_bytes(data)
    weights = read_weights(tmp_path)
    assert weights.env_steps == 10 and weights.checkpoint == "checkpoint_000000000010"
    assert "checkpoint_000000000020 not used" in weights.refused[0]
    with pytest.raises(ValueError, match="expected the model that checkpoint_000000000010 was"):
        load_weights(nn.Linear(3, 1, bias=False), weights)


# -- films ---------------------------------------------------------------------------------------


def read_film(path: Path) -> tuple[np.ndarray, float]:
    import imageio.v2

    with imageio.v2.get_reader(path) as reader:
        return np.array([frame for frame in reader]), reader.get_meta_data().get("fps", 0)


BREAKOUT = EnvConfig("ALE/Breakout-v5", atari={"max_num_frames_per_episode": 240})


def test_a_film_of_breakout_is_the_game_that_was_played(tmp_path):
    recorder, seen = Recorder(BREAKOUT, 3, seed=1), []

    def watch(step, action):
        recorder(step, action)
        seen.append(step.obs)

    envs = make_envs(BREAKOUT, 3)
    games = play_games(Favourite(4), envs, 6, 1, epsilon=1.0, on_step=watch)
    envs.close()
    assert {game.length for game in games} <= set(range(50, 61))  # 240 frames, or all lives lost
    best = recorder.best(2)
    assert best.score == max(game.score for game in games)

    # The second game of the last environment is the hardest to find again.
    ends = [t for t, row in enumerate(recorder.rows) if row.game_over[2]]
    second = Recorded(2, ends[0] + 2, ends[1] + 1, float(recorder.rows[ends[1]].episode_return[2]))
    path = recorder.film(second, tmp_path / "videos", 1234)
    assert path.name == f"1234_{second.score:g}.mp4"
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".gif", ".mp4"]
    film, fps = read_film(path)
    assert film.shape == (second.end - second.begin + 1, 420, 320, 3) and fps == 15
    assert (film[:-1] != film[1:]).any(axis=(1, 2, 3)).mean() > 0.5
    for t in (0, 20, len(film) - 1):
        small = Image.fromarray(film[t]).convert("L").resize((84, 84), Image.Resampling.BOX)
        played = seen[second.begin + t - 1][2]
        difference = np.abs(np.asarray(small, float) - played)
        assert difference.mean() < 6 and np.corrcoef(np.ravel(small), played.ravel())[0, 1] > 0.95


def test_a_twin_that_parts_is_noticed():
    recorder = Recorder(BREAKOUT, 1, seed=1)
    envs = make_envs(BREAKOUT, 1)
    play_games(Favourite(4), envs, 1, 1, epsilon=1.0, on_step=recorder)
    envs.close()
    twin = Twin(BREAKOUT, 1, 0, seed=1)
    twin.reset()
    for row in recorder.rows[:10]:
        twin.step(row.action, row)
    row = recorder.rows[10]
    with pytest.raises(EnvDataError, match=r"got reward 0.0 and not 1.0 at step 11"):
        twin.step(row.action, row._replace(reward=row.reward + 1))
    twin.close()


@pytest.mark.parametrize("vectorization", ["sync", "callable"])
def test_a_film_of_an_environment_that_renders(tmp_path, vectorization):
    config = EnvConfig(WALK)
    if vectorization == "callable":  # its seeds are its own affair: all of it is played again
        make = lambda num_envs, **kwargs: gym.make_vec(WALK, num_envs, **kwargs)  # noqa: E731
        config = EnvConfig(make)
    recorder = Recorder(config, 2, seed=3)
    envs = make_envs(config, 2)
    games = play_games(Favourite(2), envs, 8, 3, epsilon=0.5, on_step=recorder)
    envs.close()
    best = recorder.best(4)
    assert best.score == max(game.score for game in games) > min(game.score for game in games)
    path = recorder.film(best, tmp_path, 7)
    film, fps = read_film(path)
    assert film.shape == (11, 400, 600, 3) and fps == 10  # small frames are enlarged
    clip, _ = read_film(path.with_suffix(".gif"))
    positions = clip[:, 0, 0, 0] / 20
    rewards = [row.reward[best.env] for row in recorder.rows[best.begin : best.end]]
    assert positions[1:].tolist() == rewards and len(rewards) == 10
    assert 0 <= rewards[0] - positions[0] <= 1


def test_what_cannot_be_shown_is_refused_before_a_game_is_played():
    with pytest.raises(ValueError, match="render_mode='rgb_array' does not work"):
        Recorder(EnvConfig(COUNTING), 1, seed=0)  # takes no render_mode
    with pytest.raises(ValueError, match=r"frames \(H, W, 3\) of uint8, got uint8 of shape \(20"):
        Recorder(EnvConfig(WALK, kwargs={"wrong_frames": True}), 1, seed=0)


# -- the command ---------------------------------------------------------------------------------

LAUNCH_FILE = f"""
from asyncrl.config import Config
from asyncrl.envs import EnvConfig
from asyncrl.models import ModelConfig

config = Config(env=EnvConfig("{WALK}"), model=ModelConfig(hidden=(4,)), seed=3)
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder as the supervisor and the learner leave it, with untrained weights."""
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path))
    folder = tmp_path / "walk"
    folder.mkdir()
    (folder / "launch.py").write_text(LAUNCH_FILE)
    (folder / "launch.json").write_text(json.dumps({"file": "gone/launch.py", "options": []}))
    (folder / "config.json").write_text("{}")
    walk = Walk()
    model = ModelConfig(hidden=(4,))(walk.observation_space, walk.action_space)
    tensors = {
        f"algorithm|model|{name}": value.numpy() for name, value in model.state_dict().items()
    }
    Checkpoints(folder / "checkpoints").save(500, tensors, {"env_steps": 500})
    return folder


def evaluate(capfd, *arguments) -> tuple[int, str, str]:
    capfd.readouterr()
    try:
        status = cli.main(["eval", "walk", *arguments])
    except SystemExit as exit:
        status = exit.code
    return status, *capfd.readouterr()


def test_eval_prints_and_keeps_its_result(run, capfd):
    status, output, _ = evaluate(capfd, "--episodes", "7", "--envs", "3", "--video")
    assert status == 0
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    kept = json.loads(line)
    scores = [game["score"] for game in kept["games"]]
    assert len(scores) == 9 and kept["complete"] and kept["env_steps"] == 500
    assert kept["seed"] == 1003 and kept["epsilon"] == 0.01 and kept["envs"] == 3
    assert kept["eval/return"] == pytest.approx(np.mean(scores))
    assert output.startswith("run walk: checkpoint_000000000500, after 500 env steps\n")
    assert f"mean return {np.mean(scores):.2f} +- {np.std(scores):.2f} (9 games" in output
    assert (run / "videos" / f"500_{max(scores):g}.mp4").is_file()
    # The same again, and another seed.
    assert evaluate(capfd, "--episodes", "7", "--envs", "3")[1] in output
    evaluate(capfd, "--episodes", "2", "--seed", "0", "--epsilon", "1")
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 3


def test_eval_takes_one_thread_for_its_net(run, capfd):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert evaluate(capfd, "--episodes", "1")[0] == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_eval_says_what_it_cannot_do(run, capfd, monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    for arguments, expected in (
        ("--checkpoint best", "expected a valid best checkpoint in"),
        ("--render-mode human", "expected a display"),
        ("--device nothing", "--device: expected auto, cpu, or cuda"),
        ("--device meta", "--device: expected auto, cpu, or cuda"),
    ):
        status, output, errors = evaluate(capfd, *arguments.split())
        assert status == 2 and expected in errors and not output
    (run / "launch.py").write_text(LAUNCH_FILE.replace("(4,)", "(5,)"))
    status, _, errors = evaluate(capfd)
    assert (
        status == 2 and "expected the model that checkpoint_000000000500 was saved from" in errors
    )
    assert not (run / "evaluations.jsonl").exists() and not (run / "videos").exists()


def test_eval_interrupted_tells_what_was_played(run, capfd, monkeypatch):
    (run / "launch.py").write_text(LAUNCH_FILE.replace('v0"', 'v0", kwargs={"interrupts": True}'))
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("asyncrl.eval.PROGRESS_SECONDS", 0.0)
    status, output, errors = evaluate(capfd, "--episodes", "400", "--envs", "2", "--video")
    assert "asyncrl: 0 of 400 games have ended after 2 env steps" in errors
    assert status == 130 and signal.getsignal(signal.SIGINT) is before
    assert "mean return " in output and "of 400 games had ended" in output
    kept = json.loads((run / "evaluations.jsonl").read_text())
    assert not kept["complete"] and 0 < len(kept["games"]) < 400
    assert not (run / "videos").exists()


@pytest.mark.parametrize("kind", ["ValueError", "SystemExit"])
def test_eval_of_an_environment_that_fails_tells_what_was_played(run, capfd, kind):
    (run / "launch.py").write_text(LAUNCH_FILE.replace('v0"', f'v0", kwargs={{"breaks": {kind}}}'))
    status, output, errors = evaluate(capfd, "--episodes", "400", "--envs", "2", "--video")
    assert status == 1 and f"{kind}: the walk ends here" in errors
    assert "mean return " in output and "of 400 games had ended" in output
    assert not json.loads((run / "evaluations.jsonl").read_text())["complete"]
    assert not (run / "videos").exists()
