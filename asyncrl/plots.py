"""Learning curves of one or several runs as a picture, from the files in their folders."""

import json
import os
import re
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from asyncrl.logs import read_episodes, read_metrics

# Okabe and Ito's palette, told apart with any kind of colour vision; its yellow, too faint for a
# line, is left out.
BLUE, ORANGE, GREEN, PINK, SKY, AMBER, BLACK = COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000",
)  # fmt: skip
SHARE_COLORS = {
    "update": BLUE, "env": BLUE, "sync": SKY, "inference": SKY, "publish": PINK, "pull": PINK,
    "checkpoint": GREEN, "log": BLACK, "wait": AMBER, "rest": "#bbbbbb",
}  # fmt: skip
DASHES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#ebebeb", "axes.axisbelow": True, "axes.edgecolor": "#8a8a8a",
    "axes.titlesize": 9, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444",
    "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.2,
}  # fmt: skip


def plot(
    run_folders,
    output=None,
    by: str | None = None,
    group: bool = False,
    policy: str | None = None,
    lives: int = 1,
) -> Path:
    """Draw returns, evaluations, speed, policy lag, time shares and losses over env steps.

    Args:
        run_folders: a run's folder, or several.
        output: the PNG to write; by default `plots/returns.png` in a single run's folder, and
            `plot.png` in the working directory for several runs.
        by: "policy" draws a curve for each policy of the mix, of returns and of episode lengths.
        group: runs whose configuration is equal but for the seed become one curve, the
            interquartile mean over runs at each number of env steps, with the runs' 25-75 % band.
        policy: a policy of the mix; only episodes that it played are drawn.
        lives: how many episodes make a game, where each is a life; returns are drawn times that.

    Returns the path written. Raises ValueError for a folder without metrics.
    """
    if by not in (None, "policy"):
        raise ValueError(f'by: expected None or "policy", got {by!r}')
    if by and policy is not None:
        raise ValueError(f"expected by or policy, got both: {by!r} and {policy!r}")
    single = isinstance(run_folders, (str, os.PathLike))
    folders = [Path(folder) for folder in ([run_folders] if single else run_folders)]
    runs = [_Run(path) for path in {path.resolve(): path for path in folders}.values()]
    if not runs:
        raise ValueError("run_folders: expected at least one run's folder, got none")
    names = _policies(runs)
    if policy is not None and policy not in names:
        raise ValueError(
            f"expected a policy with episodes in these runs, got {policy!r}; there are: "
            + (", ".join(names) or "none yet")
        )
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        groups.setdefault(run.settings if group else str(run.folder), []).append(run)
    name = f"returns_by_{by}.png" if by else "returns.png"
    default = runs[0].folder / "plots" / name if len(runs) == 1 else "plot.png"
    output = Path(output or default)
    if output.is_dir():
        output /= name if len(runs) == 1 else "plot.png"
    elif not output.suffix:
        output = output.with_name(f"{output.name}.png")
    output.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        rows = figure.add_gridspec(2, 4, height_ratios=(2, 1), hspace=0.08)
        left = rows[0, :3] if by else rows[0, :]
        _draw_returns(figure.add_subplot(left), list(groups.values()), by, policy, lives)
        if by:
            _draw_lengths(figure.add_subplot(rows[0, 3]), list(groups.values()))
        for i, draw in enumerate((_draw_speed, _draw_lag, _draw_time, _draw_loss)):
            axes = figure.add_subplot(rows[1, i])
            draw(axes, list(groups.values()))
            axes.set_xlabel("env steps")
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.margins(x=0)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="best", fontsize=7, handlelength=1.2)
        figure.savefig(output, dpi=150)
    return output


class _Run:
    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.resolve().name
        self.metrics, self.episodes = read_metrics(folder), read_episodes(folder)
        if "env_steps" not in self.metrics:
            found = "one without rows" if folder.is_dir() else "no such folder"
            raise ValueError(
                f"{folder}: expected the folder of a run, with rows in metrics.jsonl, got {found}; "
                "give a path like runs/RUN_ID of a run that has logged at least once"
            )
        self.steps = self.metrics["env_steps"]
        try:
            config = json.loads((folder / "config.json").read_text())["config"]
            self.settings = json.dumps(config | {"seed": None}, sort_keys=True)
        except (OSError, ValueError, LookupError, TypeError):
            self.settings = str(folder)

    def binned(self, name: str, points: int = 200) -> tuple[np.ndarray, np.ndarray]:
        """A column of metrics over env steps, as means of at most `points` pieces of its rows."""
        values = self.metrics.get(name, np.array([]))
        if not np.isfinite(values).any():
            return np.array([]), np.array([])
        known = np.isfinite(values) & np.isfinite(self.steps)
        pieces = min(points, known.sum())
        split = (np.array_split(column[known], pieces) for column in (self.steps, values))
        return tuple(np.array([piece.mean() for piece in pieces]) for pieces in split)

    def evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        """Env steps and returns of the evaluations, each once however often it was logged."""
        values = self.metrics.get("eval/return", np.full(len(self.steps), np.nan))
        at = self.metrics.get("eval/env_steps", self.steps)
        known = np.isfinite(values) & np.isfinite(at)
        at, first = np.unique(at[known], return_index=True)
        return at, values[known][first]

    def curve(self, policy: str | None, column: str = "return") -> np.ndarray:
        episodes = self.episodes
        chosen = np.isfinite(episodes["return"])
        if policy is not None:
            chosen &= episodes["policy"] == policy
        return smooth(episodes["env_steps"][chosen], episodes[column][chosen])


def smooth(steps: np.ndarray, returns: np.ndarray, points: int = 300) -> np.ndarray:
    """Rows env steps, mean, 25 % and 75 % quantile of the last episodes at up to `points` moments:
    (4, points). The window is 100 episodes: fewer for less than 400, more for over 10,000."""
    order, n = np.argsort(steps, kind="stable"), len(steps)
    steps, returns = steps[order], returns[order]
    window = max(1, min(max(100, n // 100), n // 4))
    ends = np.unique(np.linspace(min(window, n), n, points).astype(int)) if n else []
    rows = []
    for end in ends:
        last = returns[max(0, end - window) : end]
        rows.append((steps[end - 1], last.mean(), *np.quantile(last, (0.25, 0.75))))
    return np.array(rows, dtype=float).reshape(-1, 4).T


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of each column: (runs, points) -> (points,)."""
    values, edges = np.sort(values, axis=0), np.linspace(0, 1, len(values) + 1)
    weights = np.maximum(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0)
    return 2 * weights @ values


def _combine(curves: list[np.ndarray], points: int = 300) -> np.ndarray:
    """One curve, as `smooth` gives it, of several runs, over the env steps they have in common."""
    curves = [curve for curve in curves if curve.size]
    if len(curves) < 2:
        return curves[0] if curves else np.empty((4, 0))
    first, last = max(c[0, 0] for c in curves), min(c[0, -1] for c in curves)
    steps = np.linspace(first, max(first, last), points)
    means = np.array([np.interp(steps, c[0], c[1]) for c in curves])
    return np.array([steps, interquartile_mean(means), *np.quantile(means, (0.25, 0.75), axis=0)])


def _label(group: list[_Run]) -> str:
    if len(group) == 1:
        return group[0].name
    name = re.sub(r"[\W_]*(seed)?[\W_]*\d+$", "", group[0].name) or group[0].name
    return f"{name}, IQM of {len(group)} seeds"


def _draw_returns(axes, groups: list[list[_Run]], by, only: str | None, lives: int) -> None:
    lines, evaluation = 0, "evaluation"
    for i, group in enumerate(groups):
        for j, policy in enumerate(_policies(group) if by else [only]):
            steps, *band = _combine([run.curve(policy) for run in group])
            mean, low, high = lives * np.array(band)
            color = COLORS[(j if by else i) % len(COLORS)]
            dashes = DASHES[(i if by else i // len(COLORS)) % 4]
            label = " · ".join(filter(None, (_label(group) if len(groups) > 1 else "", policy)))
            label = label or (_label(group) if len(group) > 1 else "training")
            label = " " * label.startswith("_") + label  # else it would not be in the legend
            axes.plot(steps, mean, dashes, color=color, label=label, linewidth=1.8)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            lines += mean.size > 0
    many = sum(map(len, groups)) > 5  # runs, whose dots would hide the curves
    for i, run in ((i, run) for i, group in enumerate(groups) for run in group):
        at, value = run.evaluations()
        color = BLACK if by else COLORS[i % len(COLORS)]
        axes.plot(at, value, "o", color=color, markerfacecolor="white", markersize=3 if many else 4,
                  alpha=0.4 if many else 1, markeredgewidth=1.2, zorder=1 if many else 2,
                  label=evaluation if at.size else None)  # fmt: skip
        evaluation = None if at.size else evaluation  # named once
    kinds = {"of seeds" if len(group) > 1 else "of recent episodes" for group in groups}
    axes.set_title(_label(groups[0]) if len(groups) == 1 else "", fontsize=11)
    band = f"band: 25-75 % {' or '.join(sorted(kinds))}"
    axes.set_title(band, loc="right", color="#777777", fontweight="normal")
    returns = "episode return" if lives == 1 else f"{lives} x return of a life"
    axes.set(xlabel="env steps", ylabel=returns)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.margins(x=0.01)
    if lines or evaluation is None:
        axes.legend(loc="upper left", frameon=True, edgecolor="none", framealpha=0.85)
    else:
        axes.text(0.5, 0.5, "no episode has ended yet", transform=axes.transAxes, ha="center")


def _draw_lengths(axes, groups: list[list[_Run]]) -> None:
    """By policy, in the colours and dashes that the returns' legend names."""
    for i, group in enumerate(groups):
        for j, policy in enumerate(_policies(group)):
            steps, mean, low, high = _combine([run.curve(policy, "length") for run in group])
            color = COLORS[j % len(COLORS)]
            axes.plot(steps, mean, DASHES[i % 4], color=color)
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(title="episode length", xlabel="env steps", ylabel="env steps")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.margins(x=0.01)
    axes.set_ylim(bottom=0)


def _draw_speed(axes, groups: list[list[_Run]]) -> None:
    for name, dashes, label in (("env_steps", "-", "env steps"), ("updates", ":", "updates")):
        for color, _, run in _each(groups):
            axes.plot(*run.binned(f"rate/{name}"), dashes, color=color, label=label)
            label = None
    axes.set(title="speed", ylabel="per second", yscale="log")  # updates may be a hundredth
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_lag(axes, groups: list[list[_Run]]) -> None:
    for color, alone, run in _each(groups):
        axes.plot(*run.binned("lag/mean"), color=color)
        (steps, low), (_, high) = run.binned("lag/min"), run.binned("lag/max")
        if alone and low.size == high.size:
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set(title="policy lag", ylabel="versions")
    axes.set_ylim(bottom=0)


def _draw_time(axes, groups: list[list[_Run]]) -> None:
    """All time shares of a single run, as two bands; of several runs, how long both sides wait."""
    for name, dashes, label in (("learner", "-", "learner"), ("actor", ":", "actors")):
        for color, alone, run in _each(groups):
            if alone:
                _draw_shares(axes, run, f"time/{name}/", bottom=1.08 * (name == "learner"))
            else:
                axes.plot(*run.binned(f"time/{name}/wait"), dashes, color=color, label=label)
                label = None
    if _alone(groups):
        axes.set(title="where the time goes", ylim=(0, 2.08))
        axes.set_yticks((0.5, 1.58), ("actors", "learner"))
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
    else:
        axes.set(title="waiting", ylabel="share of time", ylim=(0, 1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_shares(axes, run: _Run, prefix: str, bottom: float) -> None:
    shares = {name: run.binned(prefix + name) for name in SHARE_COLORS}
    shares = {name: share for name, share in shares.items() if share[0].size}
    steps = next(iter(shares.values()), [[]])[0]
    low = np.full(len(steps), bottom)
    for name, share in shares.items():
        high = low + np.interp(steps, *share)
        axes.fill_between(steps, low, high, color=SHARE_COLORS[name], alpha=0.8, linewidth=0)
        if np.mean(high - low) > 0.12:  # else there is no room for its name
            middle = np.mean((steps[0], steps[-1])), np.mean((low, high))
            axes.text(*middle, name, ha="center", va="center", fontsize=8)
        low = high


DIAGNOSTICS = {"grad_norm", "skipped", "kl", "clipped", "explained_variance"}
MEANS = {"value_mean", "q_mean", "q_variance", "td_error"}
NOT_LOSSES = {f"loss/{name}" for name in DIAGNOSTICS | MEANS}


def _draw_loss(axes, groups: list[list[_Run]]) -> None:
    drawn = set()
    for color, alone, run in _each(groups):
        names = [name for name in run.metrics if name[:5] == "loss/" and name not in NOT_LOSSES]
        for j, name in enumerate(names if alone else names[:1]):
            color = COLORS[j % len(COLORS)] if alone else color
            axes.plot(*run.binned(name), color=color, label=name[5:] if alone else None)
            drawn.add(name)
    axes.set(title="loss" if _alone(groups) or not drawn else ", ".join(sorted(drawn)))


def _policies(group: list[_Run]) -> list[str]:
    return sorted({name for run in group for name in run.episodes["policy"]})


def _alone(groups: list[list[_Run]]) -> bool:
    return len(groups) == len(groups[0]) == 1


def _each(groups: list[list[_Run]]):
    """(color, whether it is the only one, run) of all runs."""
    for color, group in zip(cycle(COLORS), groups, strict=False):
        yield from ((color, _alone(groups), run) for run in group)
