"""Plots: what is drawn, by hand numbers and the figure's artists; that a file comes out."""

import json
from pathlib import Path

import numpy as np
import pytest

from asyncrl import plots
from asyncrl.logs import RunLog
from asyncrl.plots import interquartile_mean, plot, smooth


def make_run(folder, seed=0, learning_rate=0.1, episodes=40, rows=5, level=10.0):
    log = RunLog(folder, tensorboard=False)
    log.write_episodes(
        [(0.0, 10 * i, 0, ("greedy", "random")[i % 2], level, 5) for i in range(1, episodes + 1)]
    )
    for i in range(1, rows + 1):
        log.write(
            {"env_steps": 100 * i, "rate/env_steps": 50.0, "rate/updates": 5.0, "lag/mean": 1.0}
            | {"lag/min": 0, "lag/max": 2, "loss/td": 0.5 / i, "time/learner/update": 0.9}
            | {"time/learner/wait": 0.1, "time/actor/wait": 0.7, "time/actor/env": 0.3}
            | {"eval/return": 12.0 + i // 2, "eval/env_steps": 100 * (i // 2)}
        )
    config = {"seed": seed, "algorithm": {"learning_rate": learning_rate}}
    launch = {"file": "x.py", "options": ["--seed", str(seed)]}
    about = {"config": config, "launch": launch, "git": f"{seed:07x}", "versions": {}}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that `plot` makes."""
    made = []

    class Figure(plots.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def savefig(self, path, **_):
            super().savefig(path, dpi=20)  # quick

    monkeypatch.setattr(plots, "Figure", Figure)
    return made


def lines(figure, axes=0):
    """{label: (x, y)} of the labelled lines."""
    found = figure.axes[axes].get_lines()
    return {x.get_label(): x.get_data() for x in found if not x.get_label().startswith("_")}


def test_smooth_by_hand():
    steps, mean, low, high = smooth(np.array([30, 10, 20, 40]), np.array([3.0, 1.0, 2.0, 4.0]))
    assert steps.tolist() == [10, 20, 30, 40] and mean.tolist() == [1, 2, 3, 4]  # window 4 // 4
    steps, mean, low, high = smooth(np.arange(1, 401), np.arange(1.0, 401), points=2)
    assert steps.tolist() == [100, 400]  # nothing is drawn before one window is full
    assert mean.tolist() == [50.5, 350.5]
    assert low.tolist() == [25.75, 325.75] and high.tolist() == [75.25, 375.25]
    assert smooth(np.array([]), np.array([])).shape == (4, 0)


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([[5.0], [1], [100], [3]])).tolist() == [4.0]  # of 3 and 5
    assert interquartile_mean(np.array([[7.0]])).tolist() == [7.0]
    # Of three runs the middle one whole and a quarter of each other: (1/4 + 2 + 30/4) / 1.5
    assert interquartile_mean(np.array([[1.0], [2], [30]])) == pytest.approx([6.5])


def test_one_run_goes_into_its_folder(tmp_path, figures):
    path = plot(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "plots" / "returns.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawn = lines(figures[0])
    assert drawn["training"][1].tolist() == [10.0] * len(drawn["training"][0])
    # An evaluation that five rows repeat is drawn once.
    assert [values.tolist() for values in drawn["evaluation"]] == [[0, 100, 200], [12, 13, 14]]
    assert figures[0].axes[0].get_xlabel() == "env steps"
    assert [axes.get_title("left") for axes in figures[0].axes] == [
        "run", "speed", "policy lag", "where the time goes", "loss",
    ]  # fmt: skip
    assert lines(figures[0], 4)["td"][1] == pytest.approx([0.5, 0.25, 0.5 / 3, 0.125, 0.1])


def test_by_policy(tmp_path, figures):
    plot(make_run(tmp_path / "run"), by="policy")
    assert set(lines(figures[0])) == {"greedy", "random", "evaluation"}
    returns, lengths = figures[0].axes[:2]
    assert lengths.get_title("left") == "episode length"
    curves = [line.get_ydata() for line in lengths.get_lines()]
    assert len(curves) == 2 and all(set(curve) == {5.0} for curve in curves)
    colors = [line.get_color() for line in lengths.get_lines()]
    assert colors == [line.get_color() for line in returns.get_lines()[:2]]


def test_by_policy_of_several_runs_tells_runs_by_dashes_and_policies_by_colour(tmp_path, figures):
    runs = [make_run(tmp_path / "a", level=1.0), make_run(tmp_path / "b", level=2.0)]
    plot(runs, tmp_path / "plot.png", by="policy")
    assert {"a · greedy", "a · random", "b · greedy", "b · random"} <= set(lines(figures[0]))
    for axes in figures[0].axes[:2]:
        kinds = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
        kinds = {(color, dashes) for color, dashes in kinds if dashes != "None"}  # evaluations
        assert len(kinds) == 4
        assert len({color for color, _ in kinds}) == len({dashes for _, dashes in kinds}) == 2


def test_one_policy_of_several_runs_by_lives(tmp_path, figures):
    """As the ancestor's figure: 5 x the return of the lives that the greedy policy played."""
    runs = [make_run(tmp_path / name, level=level) for name, level in (("a", 1.0), ("b", 2.0))]
    for i, run in enumerate(runs):
        text = (run / "episodes.csv").read_text()
        (run / "episodes.csv").write_text(text.replace(f"random,{i + 1}.0", "random,100.0"))
    plot(runs, tmp_path / "plot.png", policy="greedy", lives=5)
    drawn, axes = lines(figures[0]), figures[0].axes[0]
    assert set(drawn) == {"a · greedy", "b · greedy", "evaluation"}
    assert set(drawn["a · greedy"][1]) == {5.0} and set(drawn["b · greedy"][1]) == {10.0}
    assert max(drawn["a · greedy"][0]) == 400 and axes.get_ylabel() == "5 x return of a life"
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [set(band) for band in bands] == [{5.0}, {10.0}]
    assert drawn["evaluation"][1].tolist() == [12, 13, 14]  # scores of whole games already


def test_several_runs_are_a_line_each(tmp_path, figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "dqn_1", level=1.0), make_run(tmp_path / "dqn_2", seed=1, level=2.0)
    assert str(plot(["dqn_1", "dqn_2"])) == "plot.png" and (tmp_path / "plot.png").exists()
    drawn = lines(figures[0])
    assert set(drawn) == {"dqn_1", "dqn_2", "evaluation"} and set(drawn["dqn_2"][1]) == {2.0}


def test_what_is_given_twice_or_named_oddly_is_drawn_and_named(tmp_path, figures, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = (make_run(tmp_path / name) for name in ("_a", "b"))
    (second / "metrics.jsonl").write_text('{"env_steps": 900, "loss/q": 1.0}\n')
    (tmp_path / "pictures").mkdir()
    assert plot([first, second, "_a", first], "pictures") == Path("pictures/plot.png")
    assert (tmp_path / "pictures" / "plot.png").is_file()
    assert {" _a", "b"} == set(lines(figures[0])) - {"evaluation"}
    assert figures[0].axes[4].get_title(loc="left") == "loss/q, loss/td"
    assert plot([first, second], "here").name == "here.png" and Path("here.png").is_file()


def test_group_joins_what_differs_by_seed_only(tmp_path, figures):
    runs = [make_run(tmp_path / f"dqn_seed{i}", seed=i, level=float(i)) for i in range(4)]
    runs.append(make_run(tmp_path / "other", learning_rate=0.5))
    output = tmp_path / "new" / "curves.png"
    assert plot(runs, output, group=True) == output and output.exists()
    drawn = lines(figures[0])
    assert set(drawn) == {"dqn, IQM of 4 seeds", "other", "evaluation"}
    assert set(drawn["dqn, IQM of 4 seeds"][1]) == {1.5}


def test_without_config_runs_are_not_joined(tmp_path, figures):
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        (run / "config.json").unlink()
    plot(runs, tmp_path / "plot.png", group=True)
    assert {"a", "b"} <= set(lines(figures[0]))


def test_a_run_without_episodes_or_values_still_draws(tmp_path, figures):
    RunLog(tmp_path / "young", tensorboard=False).write({"env_steps": 0, "loss/td": None})
    assert plot(tmp_path / "young").exists()
    assert [text.get_text() for text in figures[0].axes[0].texts] == ["no episode has ended yet"]
    runs = [tmp_path / "young", make_run(tmp_path / "old")]
    assert plot(runs, tmp_path / "p.png", by="policy", group=True).exists()


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: expected the folder of a run.*no such folder"):
        plot(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"one without rows; give a path like runs/RUN_ID"):
        plot([make_run(tmp_path / "a"), tmp_path])
    with pytest.raises(ValueError, match="got none"):
        plot([])
    with pytest.raises(ValueError, match='expected None or "policy"'):
        plot(tmp_path, by="actor")
    with pytest.raises(ValueError, match="expected by or policy, got both: 'policy' and 'greedy'"):
        plot(tmp_path / "a", by="policy", policy="greedy")
    with pytest.raises(ValueError, match="got 'gredy'; there are: greedy, random"):
        plot(tmp_path / "a", policy="gredy")
