"""What the benchmarks share: the hardware line, tables and goals, runs in a folder of their own."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # works without an installation too


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Text as it is written, and defaults behind what is said of options."""


def arguments(text: str, repeats: int) -> argparse.ArgumentParser:
    """The options all benchmarks have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=Help)
    parser.add_argument("--repeats", type=int, default=repeats, help="of each measurement")
    parser.add_argument("--output", type=Path, help="write the same as JSON to this file")
    return parser


def like_a_run() -> None:
    """Start this program anew with the environment variables that processes of a run have.

    glibc reads them before Python starts.
    """
    from asyncrl.children import CHILD_ENVIRONMENT

    if any(os.environ.get(name) is None for name in CHILD_ENVIRONMENT):
        os.execve(sys.executable, [sys.executable, *sys.argv], CHILD_ENVIRONMENT | os.environ)


def hardware() -> dict:
    """What the figures were taken on."""
    import torch

    info = Path("/proc/cpuinfo").read_text()
    about = dict(line.split("\t: ", 1) for line in info.splitlines() if "\t: " in line)
    about = {name.strip(): value for name, value in about.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": about.get("model name", "unknown"),
        "cpu_family_model": f"{about.get('cpu family', '?')} {about.get('model', '?')}",
        "cores": len(os.sched_getaffinity(0)),
        "cores_of_the_machine": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": gpu,
        "flags": [flag for flag in wanted if flag in about.get("flags", "").split()],
        "torch": torch.__version__,
        "load_before": round(os.getloadavg()[0], 2),  # 1 minute, of what ran before among others
    }


class Report:
    """Rows and goals of one benchmark, printed as markdown and written as JSON.

    A cell that is a list holds one number a repeat; it is printed as median and range.
    """

    def __init__(self, name: str, options: argparse.Namespace):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started is ended
        from asyncrl.provenance import git_revision

        self.name, self.options, self.hardware = name, options, hardware()
        self.revision = git_revision()  # as it begins: the tree may move on
        self.tables: list[dict] = []
        self.goals: list[dict] = []
        self.notes: list[str] = []

    def table(self, rows: list[dict]) -> None:
        self.tables.append(rows)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        print("| " + " | ".join(columns) + " |")
        print("|--" + "|--:" * (len(columns) - 1) + "|")
        for row in rows:
            print("| " + " | ".join(_cell(row.get(name, "")) for name in columns) + " |")
        print()

    def goal(self, what: str, values, at_least=None, at_most=None, unit: str = "") -> None:
        """Compare the median with the goal and say so."""
        value = median(values)
        met = value >= at_least if at_least is not None else value <= at_most
        bound = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        verdict = "met" if met else "NOT MET"
        self.goals.append({"goal": what, "bound": f"{bound}{unit}", "value": value, "met": met})
        print(f"goal: {what} {bound}{unit}: {_number(value)}{unit}: **{verdict}**")

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"note: {text}")

    def finish(self) -> None:
        """The hardware line, and the JSON file if one was asked for."""
        h = self.hardware
        print(
            f"\n{h['cpu']} ({h['cpu_family_model']}), {h['cores']} of "
            f"{h['cores_of_the_machine']} cores, {h['memory_gb']} GB, {h['gpu']}; "
            f"torch {h['torch']}; {' '.join(h['flags'])}; load before: {h['load_before']}"
        )
        if self.options.output:
            data = {"benchmark": self.name, "time": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "command": " ".join(sys.argv), "revision": self.revision, "hardware": h,
                    "tables": self.tables, "goals": self.goals, "notes": self.notes}  # fmt: skip
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            self.options.output.write_text(json.dumps(data, indent=1) + "\n")


def median(values) -> float:
    return float(statistics.median(values)) if isinstance(values, list) else float(values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cell(value) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return _number(value)
    if len(value) < 2:
        return _number(median(value))
    return f"{_number(median(value))} ({_number(min(value))} - {_number(max(value))})"


def memory(pid: int) -> dict[str, int]:
    """Bytes of Rss and Pss; zeros for a process that is gone."""
    found = {"Rss": 0, "Pss": 0}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found


class Program:
    """A command in a process group of its own, that writes rows of JSON to a file."""

    def __init__(
        self, command: list, log: Path, rows: Path, folder: Path = REPOSITORY, **environment: str
    ):
        self.log, self.rows_path = log, rows
        self.begun = time.time()
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
                env=os.environ | {"PYTHONPATH": path} | environment,
            )  # fmt: skip

    def rows(self) -> list[dict]:
        """All complete rows so far; RuntimeError with the log's end if the program ended badly."""
        if self.process.poll() not in (None, 0):
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{self.process.args} ended with {self.process.returncode}:\n{tail}")
        text = self.rows_path.read_text() if self.rows_path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == "\n"]

    def stop(self) -> None:
        """SIGTERM, and SIGKILL to whatever is left after 30 seconds."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def train(launch: str, run_id: str, runs: Path, *options: object) -> Program:
    """`asyncrl train` in the folder `runs`."""
    command = [sys.executable, "-m", "asyncrl", "train", launch, run_id, *options]
    runs.mkdir(parents=True, exist_ok=True)
    log, rows = runs / f"{run_id}.log", runs / run_id / "metrics.jsonl"
    return Program(command, log, rows, ASYNCRL_RUNS=str(runs))
