"""How asyncrl starts itself: the installation that runs, whatever lies in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` would look in the current folder first, for asyncrl as for all that it imports.
_CODE = """
import sys
sys.path[0] = {root!r}
import asyncrl, runpy
sys.path[:1], sys.path[len(sys.path):] = [], [{root!r}, ""]
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this asyncrl, in a Python like this one."""
    root = str(Path(__file__).absolute().parent.parent)
    code = "; ".join(_CODE.format(root=root, module=module).strip().splitlines())
    return [sys.executable, "-c", code, *arguments]
