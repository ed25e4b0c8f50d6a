"""Pictures of games that were played.

ALE's vector env cannot render. Its twin can be looked at instead: the same environment but for
frames in colour and full size, from the same seed, given the same actions. Twin and original are
held against each other at every step, so what is seen is exactly the game that was played.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np

from asyncrl.env_config import EnvConfig
from asyncrl.env_group import EnvDataError, EnvGroup, Step
from asyncrl.envs import make_envs
from asyncrl.evaluate import first_seed

COLOUR = dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
GIF_SECONDS = 20.0


def has_twin(config: EnvConfig) -> bool:
    """Whether frames come from a twin's observations, not from render()."""
    config = config.resolved()
    return config.is_ale and config.vectorization == "native"


def make_visible(config: EnvConfig, num_envs: int, render_mode: str = "rgb_array") -> EnvGroup:
    """The same environments, but for what they show; ValueError where they show nothing."""
    config = config.resolved()
    if has_twin(config):
        name = "kwargs" if config.protocol == "none" else "atari"
        return make_envs(replace(config, **{name: getattr(config, name) | COLOUR}), num_envs)
    vectorization = "sync" if config.vectorization == "async" else config.vectorization
    kwargs = config.kwargs | {"render_mode": render_mode}
    try:
        envs = make_envs(replace(config, kwargs=kwargs, vectorization=vectorization), num_envs)
        envs.reset(0)
        if render_mode == "rgb_array":
            rendered(envs, 0)
    except (TypeError, RuntimeError, gym.error.Error) as error:
        why = str(error) or type(error).__name__
        raise ValueError(
            f"{config.name}: {render_mode=} does not work: {why}; environments need a render(), "
            "and a function that makes them is called with render_mode, to hand it on"
        ) from error
    return envs


def rendered(envs: EnvGroup, index: int) -> np.ndarray:
    """(H, W, 3) uint8: what one environment shows now."""
    frames = envs.render()
    frame = frames[index] if frames is not None else None
    if getattr(frame, "dtype", None) != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise EnvDataError(
            "expected render() to give frames (H, W, 3) of uint8, got "
            f"{getattr(frame, 'dtype', type(frame))} of shape {getattr(frame, 'shape', None)}"
        )
    return frame


class Twin:
    """Goes through the steps of environment `index` of B others, and shows its frames."""

    def __init__(self, config: EnvConfig, num_envs: int, index: int, seed: int):
        config = config.resolved()
        self._is_ale = has_twin(config)
        # Where every environment has a seed of its own, one is enough to be twin of one.
        self._alone = self._is_ale or config.vectorization in ("sync", "async")
        self._env = index
        self._seed = first_seed(seed) + (index if self._alone else 0)
        self._envs = make_visible(config, 1 if self._alone else num_envs)
        if config.is_ale:
            self.fps = 60 / self._envs.env_step_frames
        else:
            self.fps = self._envs.frames_per_second
        self._name, self._num_steps = config.name, 0

    def reset(self) -> None:
        self._num_steps = 0
        self._obs = self._envs.reset(self._seed)

    def step(self, action: np.ndarray, original: Step | Row) -> None:
        """Take the B actions; EnvDataError where the twin parts from the others."""
        env = self._env
        self._envs.send(action[env : env + 1] if self._alone else action)
        own, here = self._envs.recv(), 0 if self._alone else env
        self._num_steps += 1
        for name in ("reward", "terminated", "truncated", "game_over"):
            expected, got = getattr(original, name)[env], getattr(own, name)[here]
            if expected != got:
                raise EnvDataError(
                    f"{self._name}: expected the same game again from its seed and its actions, "
                    f"got {name} {got} and not {expected} at step {self._num_steps}; an "
                    "environment that draws from more than its seed cannot be filmed"
                )
        self._obs = own.obs

    def close(self) -> None:
        self._envs.close()

    def frame(self) -> np.ndarray:
        """(H, W, 3) uint8: where it stands now."""
        if self._is_ale:
            return self._obs.reshape(self._obs.shape[-3:])
        return rendered(self._envs, 0 if self._alone else self._env)


class Row(NamedTuple):
    """One step of B environments, less its observations."""

    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    game_over: np.ndarray
    goes_on: np.ndarray
    episode_return: np.ndarray


class Recorded(NamedTuple):
    """Where in a recording a game lies."""

    env: int
    begin: int  # its first row; the row before it, if any, is a reset step
    end: int  # one past its last row
    score: float


class Recorder:
    """Keeps all steps of an evaluation (as its `on_step`), and films the best game afterwards."""

    def __init__(self, config: EnvConfig, num_envs: int, seed: int):
        try:
            import imageio.v2
            import imageio_ffmpeg  # noqa: F401  (imageio writes mp4 by it)
        except ImportError as error:
            remedy = "pip install -e '.[video]' in the project's folder"
            raise ValueError(f"--video needs {remedy} ({error})") from error
        self._imageio = imageio.v2
        self._config, self._num_envs, self._seed = config, num_envs, seed
        self.rows: list[Row] = []
        Twin(config, num_envs, 0, seed).close()  # whatever cannot be shown is refused now

    def __call__(self, step: Step, action: np.ndarray) -> None:
        self.rows.append(Row(np.array(action), *(getattr(step, name) for name in Row._fields[1:])))

    def best(self, per_env: int) -> Recorded:
        """The best of the first `per_env` games of each environment; of equals the earliest."""
        found = []
        game_over = np.array([row.game_over & ~row.goes_on for row in self.rows])  # (T, B)
        for env in range(self._num_envs):
            begin = 0
            for last in np.nonzero(game_over[:, env])[0][:per_env].tolist():
                score = float(sum(row.episode_return[env] for row in self.rows[begin : last + 1]))
                found.append(Recorded(env, begin, last + 1, score))
                begin = last + 2
        return max(found, key=lambda game: (game.score, -game.end))

    def film(self, game: Recorded, folder: Path, env_steps: int) -> Path:
        """Write FOLDER/<env steps>_<score>.mp4 and, of the 20 s with most reward, a gif."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{env_steps}_{game.score:.6g}.mp4"
        temporary = path.with_name(f".{path.name}")  # ends in .mp4, as imageio wants it
        twin = Twin(self._config, self._num_envs, game.env, self._seed)
        reward = np.array([row.reward[game.env] for row in self.rows[game.begin : game.end]])
        length = int(GIF_SECONDS * twin.fps)
        gained = np.convolve(reward, np.ones(min(length, len(reward))), "valid")
        begin, clip = int(gained.argmax()), []
        try:
            with self._imageio.get_writer(
                temporary, fps=twin.fps, codec="libx264", quality=7, macro_block_size=2
            ) as writer:
                for i, frame in enumerate(self._frames(twin, game)):
                    size = max(1, round(400 / frame.shape[0]))  # small frames lose their colours
                    writer.append_data(frame.repeat(size, 0).repeat(size, 1))
                    if begin <= i <= begin + length:
                        clip.append(np.array(frame))
            self._imageio.mimwrite(path.with_suffix(".gif"), clip, duration=1000 / twin.fps, loop=0)
            os.rename(temporary, path)
        finally:
            twin.close()
            temporary.unlink(missing_ok=True)
        return path

    def _frames(self, twin: Twin, game: Recorded) -> Iterator[np.ndarray]:
        """The frames of one game; the games before it in its environment are passed over."""
        twin.reset()
        for i, row in enumerate(self.rows[: game.end]):
            if i >= game.begin:
                yield twin.frame()
            twin.step(row.action, row)
        yield twin.frame()


def expect_display() -> None:
    names = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if not any(os.environ.get(name) for name in names):
        raise ValueError(
            "--render-mode human: expected a display, got neither $DISPLAY nor $WAYLAND_DISPLAY; "
            "use --video where there is none"
        )


class Window:
    """Shows an evaluation of one ALE environment, as its `on_step`; True once it is closed."""

    def __init__(self, config: EnvConfig, seed: int):
        expect_display()
        try:
            import pygame
        except ImportError as error:
            raise ValueError(
                f"--render-mode human needs pip install pygame-ce ({error})"
            ) from error
        self._pygame, self._twin = pygame, Twin(config, 1, 0, seed)
        self._twin.reset()
        try:
            pygame.display.init()
            self._screen = pygame.display.set_mode((640, 480))
        except pygame.error as error:
            raise ValueError(f"expected a display for --render-mode human, got {error}") from error
        pygame.display.set_caption(config.name)
        self._next = time.monotonic()

    def __call__(self, step: Step, action: np.ndarray) -> bool:
        pygame = self._pygame
        self._twin.step(action, step)
        surface = pygame.surfarray.make_surface(self._twin.frame().swapaxes(0, 1))
        pygame.transform.scale(surface, self._screen.get_size(), self._screen)
        pygame.display.flip()
        self._next = max(self._next + 1 / self._twin.fps, time.monotonic())
        time.sleep(max(0.0, self._next - time.monotonic()))
        return any(event.type == pygame.QUIT for event in pygame.event.get())
