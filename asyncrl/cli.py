"""The command line: train, eval, serve, plot, watch, doctor, bench."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from asyncrl.foreign import leave, nobody_reads, open_standard_streams

TRAIN_USAGE = "asyncrl train LAUNCH_FILE RUN_ID [--option value ...]"
CHECKPOINTS = ["newest", "best"]
TRAIN_HELP = """\
Start the run RUN_ID, or resume it where it is one already.

The launch file is Python that defines `config = Config(...)`; launch/ holds examples. The options
are the fields of that Config, by dotted name:

    asyncrl train launch/breakout_dqn.py breakout_1 --seed 1 --actor.num-actors 2

    asyncrl train launch/breakout_dqn.py --help      lists them all, with this file's values
    --profile NAME                                   takes the Config called NAME instead

Everything about the run goes to runs/RUN_ID (or $ASYNCRL_RUNS/RUN_ID): config.json, metrics.jsonl,
episodes.csv, events.log, checkpoints/. Ctrl-C saves a checkpoint and stops; a second one stops at
once. A resumed run keeps its options; those that decide what is learned may not change.

Exit status: 0 finished, 1 failed, 2 refused, 130 after Ctrl-C, 143 after SIGTERM, 129 after
SIGHUP.
"""


def entry() -> NoReturn:
    """The command `asyncrl`."""
    open_standard_streams()
    try:
        status = main()
        sys.stdout.flush()
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        status = 128 + signal.SIGPIPE
        if not (isinstance(error, BrokenPipeError) and nobody_reads()):  # as with `| head -1`
            traceback.print_exc()
            status = 1
    leave(status)


def main(arguments: list[str] | None = None) -> int:
    """As `entry`; returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "doctor", "bench"):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.do(options, rest)
    except KeyboardInterrupt:
        return 130


class _Version(argparse.Action):
    def __call__(self, parser, *_) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print("asyncrl", version("asyncrl"))
        except PackageNotFoundError:
            print("asyncrl, not installed, of", Path(__file__).parent)
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncrl",
        description="Asynchronous actor-learner deep reinforcement learning on one box.",
        epilog="asyncrl COMMAND --help tells more. Runs lie in runs/ here, or in $ASYNCRL_RUNS.",
    )
    parser.add_argument("--version", nargs=0, action=_Version, help="print it, and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def command(name: str, do, help: str, **kwargs) -> argparse.ArgumentParser:
        kwargs = {"description": help[0].upper() + help[1:] + "."} | kwargs
        added = commands.add_parser(name, help=help, **kwargs)
        added.set_defaults(command=name, do=do, parser=added)
        return added

    train = command(
        "train", _train, "start or resume a run", add_help=False, usage=TRAIN_USAGE,
        description=TRAIN_HELP, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    # Not required here: `train --help` and `train LAUNCH_FILE --help` are told apart in _train.
    train.add_argument("launch_file", type=Path, nargs="?", help=argparse.SUPPRESS)
    train.add_argument("run_id", nargs="?", help=argparse.SUPPRESS)

    evaluate = command(
        "eval", _eval, "play whole games with a checkpoint of a run",
        description="Play whole games, without learning, with a checkpoint of a run: a running one "
        "too. The result is printed, and a line of it goes to RUN/evaluations.jsonl.",
    )  # fmt: skip
    evaluate.add_argument("run", metavar="RUN", help="id or folder of a run")

    def add(name: str, help: str, default=None, **kwargs) -> None:
        help += f" (default: {default})" if default else ""
        evaluate.add_argument(name, help=help, default=default, **kwargs)

    number = {"type": _positive, "metavar": "N"}
    add("--episodes", "games to play; every environment plays equally many", 30, **number)
    add("--checkpoint", "best: by evaluations beside training", "newest", choices=CHECKPOINTS)
    add("--epsilon", "share of random actions", 0.01, type=_share, metavar="E")
    add("--envs", "games played side by side", 5, **number)
    words = "of games and random actions (default: the run's + 1000: best was chosen on the run's)"
    add("--seed", words, type=_natural, metavar="N")
    words = "film the best game: RUN/videos/ENV-STEPS_SCORE.mp4 and a short .gif"
    evaluate.add_argument("--video", action="store_true", help=words)
    add("--render-mode", "watch one environment in a window", choices=["human"])
    add("--device", "cpu, cuda, cuda:1 ...", "auto", metavar="D")

    serve = command(
        "serve", _serve, "let other programs ask what to do: a server of a run's policy",
        description="Answer POST /act with the best action for an observation, by a checkpoint of "
        'a run: {"obs": ..., "first": true, "game": "a"} -> {"action": ...}. GET / tells the '
        "spaces. Who can reach the address may ask; there are no passwords.",
    )  # fmt: skip
    serve.add_argument("run", metavar="RUN", help="id or folder of a run")
    words = "best: by evaluations beside training (default: newest)"
    serve.add_argument("--checkpoint", default="newest", choices=CHECKPOINTS, help=words)
    words = "address to answer at (default: 127.0.0.1, this machine only)"
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help=words)
    words = "0: one that is free (default: 8000)"
    serve.add_argument("--port", type=_natural, default=8000, metavar="N", help=words)
    words = "cpu, cuda, cuda:1 ... (default: auto)"
    serve.add_argument("--device", default="auto", metavar="D", help=words)

    plot = command("plot", _plot, "draw the curves of runs")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="ids or folders of runs")
    plot.add_argument(
        "--output", type=Path, metavar="FILE",
        help="where to, by its ending a .png, .svg or .pdf (default: in RUN/plots, for several "
        "runs plot.png here)",
    )  # fmt: skip
    plot.add_argument("--by", choices=["policy"], help="a curve for each policy of the mix")
    words = "only episodes of this policy of the mix"
    plot.add_argument("--policy", metavar="NAME", help=words)
    words = "episodes are lives, of which a game has N: draw N x their return"
    plot.add_argument("--lives", type=_positive, default=1, metavar="N", help=words)
    plot.add_argument("--group", action="store_true", help="one band for runs that differ by seed")

    watch = command(
        "watch", _watch, "look at a run while it goes on",
        description="Look at a run while it goes on, from its files only; Ctrl-C leaves it alone. "
        "Into a pipe it writes plain lines.",
    )  # fmt: skip
    watch.add_argument("run", metavar="RUN", help="id or folder of a run")
    words = "say in one line how it is, and exit: 0 if it is well or finished, 1 if not"
    watch.add_argument("--health", action="store_true", help=words)

    examine = command(
        "doctor", _doctor, "check what a run needs against what there is",
        usage="asyncrl doctor [LAUNCH_FILE [RUN_ID] [--option value ...]]",
        description="Check what a run needs against what there is: packages, processors, GPU, "
        "disk, and with a launch file also its environment, memory, disk and open files. Says "
        "what to do about what is amiss; exit status 0, or 2 where a run would be refused.",
    )  # fmt: skip
    examine.add_argument("launch_file", type=Path, nargs="?", help="what is to be trained")
    examine.add_argument("run_id", nargs="?", help="where to")

    measure = command(
        "bench", _bench, "measure how fast a launch file will be here",
        usage="asyncrl bench LAUNCH_FILE [--option value ...]",
        description="Time an actor and the learner of a launch file alone, for about a minute, and "
        "say how fast they will be together, what limits it, and with how many actors, groups and "
        "threads they would be fastest here. The number of environments stays as it is.",
    )  # fmt: skip
    measure.add_argument("launch_file", type=Path, help="what is to be trained")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def runs_folder() -> Path:
    """Where runs lie: $ASYNCRL_RUNS, else runs/ here."""
    return Path(os.environ.get("ASYNCRL_RUNS") or "runs").absolute()


def find_run(name: str) -> Path:
    """A run by id or by path."""
    for folder in (runs_folder() / name, Path(name)):
        if os.path.isfile(folder / "config.json"):  # a name may be too long even to look
            return folder
    known = sorted(path.parent.name for path in runs_folder().glob("*/config.json"))
    known[20:] = [f"{len(known) - 20} more"] * (len(known) > 20)
    refuse(
        f"expected the id of a run in {runs_folder()}, got {name!r}; "
        + (f"there are: {', '.join(known)}" if known else "there are none yet")
    )


def refuse(message: str):
    print(f"asyncrl: {message}", file=sys.stderr)
    raise SystemExit(2)


def _check_run_id(run_id: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", run_id):
        refuse(
            "expected a run id of at most 200 letters, digits, '_', '-' and '.', got "
            f"{run_id!r:.99}; it becomes the name of a folder, and stands behind the launch file"
        )


def _train(options, rest: list[str]) -> int:
    wants_help = "--help" in rest or "-h" in rest
    if options.launch_file is None and wants_help:
        options.parser.print_help()
        return 0
    if options.launch_file is None or (options.run_id is None and not wants_help):
        missing = "RUN_ID" if options.launch_file else "LAUNCH_FILE and RUN_ID"
        options.parser.error(f"expected {missing} before any options; see asyncrl train --help")
    if wants_help:
        options.run_id = "RUN_ID"  # told by the launch file's config; no run is looked at
    from asyncrl.screen import Screen
    from asyncrl.supervisor import train

    _check_run_id(options.run_id)
    return train(options.launch_file, options.run_id, rest, runs_folder(), Screen)


def _eval(options, rest: list[str]) -> int:
    folder = find_run(options.run)  # before PyTorch is loaded, which takes seconds
    from asyncrl.eval import main
    from asyncrl.folder import Refused

    try:
        return main(folder, options)
    except Refused as error:
        refuse(str(error))


def _serve(options, rest: list[str]) -> int:
    folder = find_run(options.run)
    from asyncrl.folder import Refused
    from asyncrl.serve import main

    try:
        return main(folder, options)
    except Refused as error:
        refuse(str(error))


def _plot(options, rest: list[str]) -> int:
    folders = [find_run(run) for run in options.runs]
    try:
        from asyncrl.plots import plot

        drawn = options.output, options.by, options.group, options.policy, options.lives
        print(plot(folders, *drawn))
    except ImportError as error:
        refuse(f"plot needs pip install -e '.[plot]' in the project's folder ({error})")
    except (OSError, ValueError) as error:
        refuse(str(error))
    return 0


def _watch(options, rest: list[str]) -> int:
    import time

    from asyncrl.health import is_held, look

    folder = find_run(options.run)
    if options.health:
        well, words = look(folder)
        print(words)
        return 0 if well else 1
    from asyncrl.panel import Panel

    with Panel(folder) as panel:
        try:
            while True:
                panel.held = is_held(folder)
                panel.refresh()
                if panel.life.ended:
                    break
                time.sleep(1)
        except KeyboardInterrupt:
            return 0
    print(f"{folder.name} {look(folder).words}")
    return 0


def _bench(options, rest: list[str]) -> int:
    from asyncrl.bench import main

    if not os.path.isfile(options.launch_file):
        refuse(
            f"expected a launch file, got {options.launch_file}, which is not there; launch/ holds "
            "examples"
        )
    return main(options.launch_file, rest)


def _doctor(options, rest: list[str]) -> int:
    from asyncrl.doctor import doctor

    if rest and options.launch_file is None:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.run_id is not None:
        _check_run_id(options.run_id)
    return doctor(options.launch_file, options.run_id, rest, runs_folder())
