"""How asyncrl starts itself: the installation that runs, whatever lies in the current folder."""

from __future__ import annotations

import sys
from pathlib import Path

# `python -m` would look in the current folder first, for asyncrl as for all that it imports. Here
# that comes last, or not at all where PYTHONSAFEPATH rules it out.
_CODE = (
    "import sys; root, module = sys.argv[1:3]; del sys.argv[1:3]; "
    "here = sys.path[:1] == ['']; sys.path[:here] = [root]; import asyncrl, runpy; "
    "sys.path = [*sys.path[1:], root, *[''] * here]; "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def program(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this asyncrl, in a Python like this one."""
    root = str(Path(__file__).absolute().parent.parent)
    return [sys.executable, "-c", _CODE, root, module, *arguments]
