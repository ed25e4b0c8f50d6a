"""`asyncrl serve`: what a run has learned, for other programs: a server that answers /act.

    POST /act   {"obs": ..., "first": true, "game": "a"}  ->  {"action": ...}
    GET /       the run, its checkpoint, and the spaces of observations and actions

Observations are those that the run's environments show, as JSON: lists for arrays and tuples,
objects for dicts. `first`, false unless given, says that this one opens an episode. What a network
remembers is kept by the name of a game, "" unless given, so several may be played side by side.
Actions are the environment's own, the best or the likeliest.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from asyncrl.config import ConfigError
from asyncrl.disk import CheckpointError
from asyncrl.env_actions import Actions
from asyncrl.envs import make_envs
from asyncrl.eval import config_of, device_for, load_weights, read_weights
from asyncrl.folder import Refused
from asyncrl.models.layers import noisy_layers
from asyncrl.sampling import mode
from asyncrl.types import tree_map

MAX_GAMES = 1_000  # whose memory is kept; beyond, the one that was played least lately is forgotten
MAX_BYTES = 64 << 20  # of a request
SECONDS = 30.0  # a client may take to say what it wants


def main(folder: Path, options) -> int:
    """Answer until Ctrl-C; Refused where that cannot be. Returns the exit status."""
    torch.set_num_threads(1)
    try:
        weights = read_weights(folder, options.checkpoint)
        config = config_of(folder)
        envs = make_envs(config.env, 1)
        player = Player(
            config.model(envs.observation_space, envs.action_space),
            envs.observation_space, envs.actions, device_for(options.device),
        )  # fmt: skip
        envs.close()
        load_weights(player.model, weights)
        server = Server((options.host, options.port), player, {
            "run": folder.resolve().name,
            "checkpoint": weights.checkpoint,
            "env_steps": weights.env_steps,
            "observation_space": str(player.observation_space),
            "action_space": str(player.actions.own),
        })  # fmt: skip
    except (CheckpointError, ConfigError, ImportError, ValueError) as error:
        raise Refused(str(error)) from error
    except (OSError, OverflowError) as error:
        where = f"{options.host}:{options.port}"
        raise Refused(
            f"expected an address and a free port for --host and --port, got {where}: {error}"
        ) from error
    for refused in weights.refused:
        print(f"asyncrl: {refused}", file=sys.stderr)
    host, port = server.server_address[:2]
    print(json.dumps(server.about, indent=1))
    print(f"answers http://{host}:{port}/act; Ctrl-C ends it", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0


class Player:
    """A model and what it remembers of each game."""

    def __init__(self, model: nn.Module, observation_space: spaces.Space, actions: Actions, device):
        self.model = model.to(device).eval().requires_grad_(False)
        self.observation_space, self.actions, self.device = observation_space, actions, device
        for layer in noisy_layers(model):
            layer.silence()
        self._memories: OrderedDict[str, Any] = OrderedDict()
        self._lock = Lock()

    def act(self, obs: Any, first: bool = False, game: str = "") -> Any:
        """The action, as JSON has it, on an observation as JSON has it; ValueError for what is not
        one. A game that is not known begins here, whatever `first` says."""
        rows = tree_map(
            lambda x: torch.from_numpy(x).view(1, 1, *x.shape).to(self.device),
            from_json(self.observation_space, obs),
        )
        with self._lock, torch.inference_mode():
            state = self._memories.pop(game, None)
            if state is None:
                first, state = True, self.model.initial_state(1)
                state = tree_map(lambda x: x.to(self.device), state)
            outputs, state = self.model(rows, torch.tensor([[first]], device=self.device), state)
            self._memories[game] = state
            if len(self._memories) > MAX_GAMES:
                self._memories.popitem(last=False)
        outputs = {name: output[0].float().cpu().numpy() for name, output in outputs.items()}
        return self.actions.for_env(mode(outputs))[0].tolist()


def from_json(space: spaces.Space, value: Any, name: str = "obs") -> Any:
    """An observation of a space, as a tree of arrays; ValueError where it is none."""
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.keys():
            got = sorted(value) if isinstance(value, dict) else value
            raise ValueError(f"{name}: expected an object of {sorted(space)}, got {got!r:.99}")
        return {key: from_json(space[key], value[key], f"{name}[{key!r}]") for key in space}
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, list) or len(value) != len(space):
            raise ValueError(f"{name}: expected a list of {len(space)}, got {value!r:.99}")
        return tuple(from_json(part, value[i], f"{name}[{i}]") for i, part in enumerate(space))
    expected = f"{name}: expected {space.dtype} of shape {space.shape}"
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{expected}, got lists of unequal lengths") from error
    if array.dtype.kind not in "biuf" or array.shape != space.shape:
        what = "numbers" if array.dtype.kind in "biuf" else "something else"
        raise ValueError(f"{expected}, got {what} of shape {array.shape}")
    with np.errstate(all="ignore"):
        found = array.astype(space.dtype)
    fits = np.isfinite(found) if found.dtype.kind == "f" else found == array
    if not np.all(fits):
        raise ValueError(f"{expected}, got {array[~fits].ravel()[:3].tolist()}, which do not fit")
    return found


class Server(ThreadingHTTPServer):
    """Port 0 takes one that is free."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], player: Player, about: dict):
        super().__init__(address, _Handler)
        self.player, self.about = player, about

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # who asked is gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a connection may ask many times
    timeout = SECONDS

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer(200, self.server.about)
        else:
            self._answer(404, {"error": f"expected GET / or POST /act, got GET {self.path:.99}"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            expected = f"expected a Content-Length of at most {MAX_BYTES:,} bytes"
            error = {"error": f"{expected}, got {length or 'none'}"}
            return self._answer(413, error, Connection="close")  # what was sent stays unread
        body = self.rfile.read(int(length))
        if self.path != "/act":
            return self._answer(404, {"error": f"expected POST /act, got POST {self.path:.99}"})
        try:
            action = self.server.player.act(**_question(body))
        except ValueError as error:
            return self._answer(400, {"error": str(error)})
        except Exception as error:  # of the user's model
            traceback.print_exc()
            return self._answer(500, {"error": f"{type(error).__name__}: {error}"})
        self._answer(200, {"action": action})

    def _answer(self, status: int, content: dict, **headers: str) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        """Nothing: there may be thousands a second."""


def _question(body: bytes) -> dict:
    """The arguments of `Player.act`; ValueError where they are none."""
    try:
        question = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected JSON, got {body[:99]!r}: {error}") from error
    kinds = {"first": bool, "game": str}
    if not isinstance(question, dict) or not {"obs"} <= question.keys() <= {"obs", *kinds}:
        raise ValueError(
            'expected {"obs": ...}, perhaps with "first" and "game", got '
            + (f"{sorted(question)}" if isinstance(question, dict) else f"{question!r:.99}")
        )
    for name, kind in kinds.items():
        if not isinstance(question.get(name, kind()), kind):
            expected = "true or false" if kind is bool else "a string"
            raise ValueError(f"{name}: expected {expected}, got {question[name]!r:.99}")
    return question
