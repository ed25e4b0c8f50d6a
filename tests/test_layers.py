"""Imports go downwards only, and the parent of a run loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "asyncrl"

LAYERS = [
    {"types", "disk", "describe", "state", "schedules", "sampling", "limits", "example_envs"}
    | {"foreign", "priority", "spec_json", "transfer", "program"},
    {
        "env_actions",
        "env_config",
        "env_contract",
        "env_group",
        "envs",
        "models",
        "policies",
        "policy_contract",
        "switch_policies",
        "transport",
        "stores",
        "metrics",
        "logs",
    }
    | {"segments", "checkpoint", "provenance"},
    {"algorithms"},
    {"actor", "learner", "learner_config", "replay_stream", "throttle", "threads"}
    | {"evaluate", "guards", "resume"},
    {"config"},
    {"costs", "plan", "folder", "preflight", "children", "memory", "run", "template"}
    | {"supervisor", "video"},
    {"panel", "screen", "health", "plots", "doctor", "bench", "eval", "serve", "cli"}
    | {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Stations of asyncrl that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("asyncrl."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("asyncrl.")]
            found |= {name.split(".")[1] for name in names}
    return found


def files() -> list[tuple[str, Path]]:
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return [(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path) for path in paths]


def test_every_station_has_a_layer_and_looks_down_only():
    for station, path in files():
        assert station in LEVEL, f"{path.name} has no layer: say in this test where it belongs"
        for other in imports_of(path) - {station}:
            assert LEVEL[other] <= LEVEL[station], f"{path} imports {other} from a higher layer"


def test_no_cycles():
    graph: dict[str, set[str]] = {}
    for station, path in files():
        graph.setdefault(station, set()).update(imports_of(path) - {station})
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: others - set(leaves) for name, others in graph.items()}
    assert not graph


def test_the_parent_of_a_run_loads_no_torch():
    code = "import asyncrl.cli, asyncrl.supervisor, asyncrl.panel; import sys; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_the_road_is_short():
    """Following a transition and an update takes at most 13 files and 2,000 lines of code."""
    road = ["env_group", "actor", "types", "policies", "models/__init__", "models/cores"]
    road += ["transport/ring", "transport/weights", "transport/shared_memory", "learner"]
    road += ["stores/replay", "stores/limiter", "algorithms/dqn"]
    assert len(road) <= 13
    lines = 0
    for name in road:
        source = (PACKAGE / f"{name}.py").read_text()
        tree = ast.parse(source)
        docs = [
            node.body[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node)
        ]
        prose = sum(doc.end_lineno - doc.lineno + 1 for doc in docs)
        code = [line for line in source.splitlines() if line.strip() and line.strip()[0] != "#"]
        lines += len(code) - prose
    assert lines <= 2_000
