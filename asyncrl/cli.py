"""The command line: train, eval, plot, watch, doctor, bench."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Entry of `asyncrl`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="asyncrl", description="Asynchronous actor-learner deep RL on one box."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="start or resume a run", add_help=False,
        usage="asyncrl train LAUNCH_FILE RUN_ID [--option value ...]",
    )  # fmt: skip
    train.add_argument("launch_file", type=Path)
    train.add_argument("run_id")
    plot = commands.add_parser("plot", help="draw the curves of runs")
    plot.add_argument("runs", nargs="+", metavar="RUN")
    plot.add_argument("--output", type=Path)
    plot.add_argument("--by", choices=["policy"])
    plot.add_argument("--group", action="store_true", help="one band for runs that differ by seed")
    watch = commands.add_parser("watch", help="look at a running job")
    watch.add_argument("run", metavar="RUN")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return COMMANDS[options.command](options, rest)


def runs_folder() -> Path:
    """Where runs lie: $ASYNCRL_RUNS, else runs/ here."""
    return Path(os.environ.get("ASYNCRL_RUNS", "runs")).absolute()


def find_run(name: str) -> Path:
    """A run by id or by path."""
    for folder in (runs_folder() / name, Path(name)):
        if (folder / "config.json").is_file():
            return folder
    known = sorted(path.parent.name for path in runs_folder().glob("*/config.json"))
    refuse(
        f"expected the id of a run in {runs_folder()}, got {name!r}; "
        + (f"there are: {', '.join(known)}" if known else "there are none yet")
    )


def refuse(message: str):
    print(f"asyncrl: {message}", file=sys.stderr)
    raise SystemExit(2)


def _train(options, rest: list[str]) -> int:
    from asyncrl.panel import Panel
    from asyncrl.supervisor import train

    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", options.run_id):
        refuse(
            f"expected a run id of letters, digits, '_', '-' and '.', got {options.run_id!r}; "
            "it becomes the name of a folder"
        )
    return train(options.launch_file, options.run_id, rest, runs_folder(), Panel)


def _plot(options, rest: list[str]) -> int:
    from asyncrl.plots import plot

    folders = [find_run(run) for run in options.runs]
    try:
        print(plot(folders, options.output, options.by, group=options.group))
    except ValueError as error:
        refuse(str(error))
    return 0


def _watch(options, rest: list[str]) -> int:
    import time

    from asyncrl.panel import Panel

    with Panel(find_run(options.run)) as panel:
        try:
            while True:
                panel.refresh()
                time.sleep(1)
        except KeyboardInterrupt:
            return 0


COMMANDS = {"train": _train, "plot": _plot, "watch": _watch}

if __name__ == "__main__":
    sys.exit(main())
