"""The server of a policy: what it answers over HTTP is what the same network does in evaluation."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from asyncrl import cli, serve
from asyncrl.checkpoint import Checkpoints
from asyncrl.env_actions import Actions
from asyncrl.env_config import EnvConfig
from asyncrl.envs import make_envs
from asyncrl.evaluate import play_games
from asyncrl.models import ModelConfig
from asyncrl.serve import Player, Server, from_json


class Client:
    """Asks one server over one connection."""

    def __init__(self, port: int):
        self.connection = HTTPConnection("127.0.0.1", port, timeout=10)

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, dict]:
        self.connection.request(method, path, body)
        answer = self.connection.getresponse()
        return answer.status, json.loads(answer.read())

    def act(self, **question) -> tuple[int, dict]:
        return self.ask("POST", "/act", json.dumps(question))


@pytest.fixture
def client():
    """Makes clients of servers of players."""
    opened = []

    def make(player: Player) -> Client:
        server = Server(("127.0.0.1", 0), player, {"run": "x"})
        Thread(target=server.serve_forever, daemon=True).start()
        opened.extend([server, Client(server.server_address[1])])
        return opened[-1]

    yield make
    for server, asker in zip(opened[::2], opened[1::2], strict=True):
        asker.connection.close()
        server.shutdown()
        server.server_close()


def test_answers_are_the_actions_of_an_evaluation_game_by_game(client):
    torch.manual_seed(1)
    envs = make_envs(EnvConfig("CartPole-v1"), 1)
    model = ModelConfig(hidden=(16,), frame_stack=3, lstm=8)
    model = model(envs.observation_space, envs.action_space)
    player = Player(model, envs.observation_space, envs.actions, torch.device("cpu"))
    seen, reset = [], envs.reset  # (obs, first, action)
    shown = []

    def note_reset(seed):
        shown.append((reset(seed)[0].tolist(), True))
        return np.array([shown[-1][0]], np.float32)

    def note(step, action):
        seen.append((*shown[-1], int(action[0])))
        shown.append((step.obs[0].tolist(), bool(step.first[0])))
        return len(seen) == 60

    envs.reset = note_reset
    play_games(model, envs, 30, seed=0, epsilon=0, on_step=note)
    assert sum(opens for _, opens, _ in seen) > 2, "memory must be cut more than once"
    assert len({action for *_, action in seen}) == 2, "the network must not be blind"

    asker = client(player)
    answers = {"a": [], "b": []}
    for row in range(60):  # b lies three rows behind
        for game, t in ("a", row), ("b", row - 3):
            if t >= 0:
                obs, opens, _ = seen[t]
                answers[game].append(asker.act(obs=obs, first=opens, game=game))
    expected = [(200, {"action": action}) for *_, action in seen]
    assert answers == {"a": expected, "b": expected[:-3]}


class Remembers(nn.Module):
    """Takes as many steps as it has made in the episode, modulo 3, for its action."""

    def __init__(self):
        super().__init__()
        self.fails = False

    def initial_state(self, num_envs):
        return {"steps": torch.zeros(num_envs)}

    def forward(self, obs, first, state):
        if self.fails:
            raise RuntimeError("out of order")
        steps = torch.where(first[0], 0, state["steps"])
        return {"q": nn.functional.one_hot(steps.long() % 3, 3).float()[None]}, {"steps": steps + 1}


def counting_player(space: spaces.Space | None = None) -> Player:
    actions = Actions(spaces.Discrete(3, start=5), "x")
    return Player(Remembers(), space or spaces.Discrete(9), actions, torch.device("cpu"))


def test_actions_are_the_environments_own_and_games_apart(client):
    asker = client(counting_player())
    moves = [("", False), ("", False), ("b", False), ("", False), ("b", True), ("b", False)]
    found = [asker.act(obs=1, first=first, game=game)[1]["action"] for game, first in moves]
    assert found == [5, 6, 5, 7, 5, 6]
    assert asker.ask("POST", "/act", '{"obs": 1}') == (200, {"action": 5})
    assert asker.ask("GET", "/") == (200, {"run": "x"})


def test_the_game_that_was_played_least_lately_is_forgotten(monkeypatch):
    monkeypatch.setattr(serve, "MAX_GAMES", 2)
    player = counting_player()
    assert [player.act(1, game=game) for game in "abaacab"] == [5, 5, 6, 7, 5, 5 + 3 % 3, 5]
    assert list(player._memories) == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("{", 400, "expected JSON, got"),
        ("[" * 100_000, 400, "expected JSON, got"),
        ("[1]", 400, r'expected \{"obs": ...\}, perhaps with "first" and "game", got \[1\]'),
        ('{"first": true}', 400, r"got \['first'\]"),
        ('{"obs": 1, "frist": true}', 400, r"got \['frist', 'obs'\]"),
        ('{"obs": 1, "first": 1}', 400, "first: expected true or false, got 1"),
        ('{"obs": 1, "game": 1}', 400, "game: expected a string, got 1"),
        ('{"obs": [1]}', 400, r"obs: expected int64 of shape \(\), got numbers of shape \(1,\)"),
        ('{"obs": 1.5}', 400, r"got \[1.5\], which do not fit"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(client, body, status, words):
    asker = client(counting_player())
    found, answer = asker.ask("POST", "/act", body)
    assert found == status and re.search(words, answer["error"]), answer
    assert asker.act(obs=1) == (200, {"action": 5}), "the connection and the game go on"


def test_other_paths_sizes_and_failures_have_their_own_answers(client, monkeypatch, capfd):
    player = counting_player()
    asker = client(player)
    assert asker.ask("GET", "/act")[0] == 404 and asker.ask("POST", "/", "{}")[0] == 404
    player.model.fails = True
    assert asker.act(obs=1) == (500, {"error": "RuntimeError: out of order"})
    assert "out of order" in capfd.readouterr().err
    monkeypatch.setattr(serve, "MAX_BYTES", 9)
    assert asker.ask("POST", "/act", '{"obs": 12}')[0] == 413
    player.model.fails = False
    assert asker.ask("POST", "/act", '{"obs":1}') == (200, {"action": 5})  # connected anew


IMAGE = spaces.Box(0, 255, (2, 2), np.uint8)
TREE = spaces.Dict(
    {"a": spaces.Tuple([IMAGE, spaces.MultiBinary(2)]), "b": spaces.Box(-1, 1, (1,))}
)


def test_observations_from_json():
    found = from_json(TREE, {"b": [1], "a": [[[0, 255], [1, 2]], [True, 0]]})
    assert found["b"].dtype == np.float32 and found["b"].tolist() == [1.0]
    image, flags = found["a"]
    assert image.dtype == np.uint8 and image.tolist() == [[0, 255], [1, 2]]
    assert flags.dtype == np.int8 and flags.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("space", "value", "words"),
    [
        (IMAGE, [[0, 256], [0, 0]], r"obs: expected uint8 of shape \(2, 2\), got \[256\], which"),
        (IMAGE, [[0, -1], [0, 0]], r"got \[-1\], which do not fit"),
        (IMAGE, [[0], [0, 0]], "got lists of unequal lengths"),
        (IMAGE, [["0", "1"], ["2", "3"]], r"got something else of shape \(2, 2\)"),
        (IMAGE, [0, 0, 0, 0], r"got numbers of shape \(4,\)"),
        (spaces.Box(-1, 1, (1,)), [float("nan")], r"got \[nan\], which do not fit"),
        (spaces.Box(-1, 1, (1,)), [1e300], r"got \[1e\+300\], which do not fit"),
        (spaces.Discrete(4), 10**30, "got something else"),
        (TREE, {"b": [1]}, r"obs: expected an object of \['a', 'b'\], got \['b'\]"),
        (TREE, [1], r"obs: expected an object of \['a', 'b'\], got \[1\]"),
        (TREE, {"b": [1], "a": [1]}, r"obs\['a'\]: expected a list of 2, got \[1\]"),
        (TREE, {"b": [1], "a": [0, [1, 1]]}, r"obs\['a'\]\[0\]: expected uint8"),
    ],
)
def test_what_is_no_observation_is_refused(space, value, words):
    with pytest.raises(ValueError, match=words):
        from_json(space, value)


LAUNCH_FILE = """
from asyncrl import Config, DQNConfig, EnvConfig, ModelConfig

config = Config(env=EnvConfig("CartPole-v1"), model=ModelConfig(hidden=(4,)), algorithm=DQNConfig())
"""


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run folder as the supervisor and the learner leave it, with untrained weights."""
    monkeypatch.setenv("ASYNCRL_RUNS", str(tmp_path))
    folder = tmp_path / "cart"
    folder.mkdir()
    (folder / "launch.py").write_text(LAUNCH_FILE)
    (folder / "launch.json").write_text(json.dumps({"file": "gone/launch.py", "options": []}))
    (folder / "config.json").write_text("{}")
    model = ModelConfig(hidden=(4,))(spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    tensors = {f"algorithm|model|{k}": value.numpy() for k, value in model.state_dict().items()}
    Checkpoints(folder / "checkpoints").save(7, tensors, {"env_steps": 7})
    return folder


def test_the_command_answers_until_ctrl_c(run):
    command = [sys.executable, "-m", "asyncrl", "serve", "cart", "--port", "0", "--device", "cpu"]
    repository = Path(__file__).parent.parent
    process = subprocess.Popen(
        command, cwd=repository, env=os.environ | {"PYTHONPATH": str(repository)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = ""
        while not (address := re.search(r"answers http://127.0.0.1:(\d+)/act", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        asker = Client(int(address[1]))
        status, about = asker.ask("GET", "/")
        assert status == 200 and about == json.loads(said[: said.index("answers")])
        assert about["run"] == "cart" and about["env_steps"] == 7
        assert about["action_space"] == "Discrete(2)"
        status, answer = asker.act(obs=[0, 0, 0, 0])
        assert status == 200 and answer["action"] in (0, 1)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode == 0 and "Traceback" not in rest, rest
    finally:
        process.kill()
        process.communicate()


def test_a_port_that_is_taken_and_a_run_without_checkpoint_are_refused(run, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            cli.main(["serve", "cart", "--port", str(port)])
    assert f"free port for --host and --port, got 127.0.0.1:{port}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "cart", "--port", "70000"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", "cart", "--checkpoint", "best"])
    assert "expected a valid best checkpoint" in capsys.readouterr().err
