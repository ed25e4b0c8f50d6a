"""Configurations as plain JSON: what config.json shows, and what a resume compares."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection
from typing import Any

# Fields that may change when a run is resumed: they do not decide what is learned.
RESUMABLE = ("total_env_steps", "evaluation.", "learner.", "actor.nice", "actor.num_threads",
             "actor.device", "env.num_threads")  # fmt: skip

LONGEST = 2_000  # characters of an array that is told in full


def describe(value: Any) -> Any:
    """A configuration in plain JSON types; callables by name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | fields
    if isinstance(value, dict):
        return {str(key): describe(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "tolist") and not isinstance(value, type):  # numpy's and torch's, by value
        plain = describe(value.tolist())
        if len(text := json.dumps(plain)) <= LONGEST:
            return plain
        kind = getattr(value, "dtype", type(value).__name__)
        return f"<{kind} {tuple(getattr(value, 'shape', ()))}, SHA-256 of its values {_sha(text)}>"
    name = getattr(value, "__qualname__", None) or type(value).__qualname__  # never an address
    return f"<{getattr(value, '__module__', '?')}.{name}>"


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def unset_fields(value: Any, path: str = "") -> list[str]:
    """Dotted paths of the fields of a configuration that are as their classes have them."""
    found = []
    for field in dataclasses.fields(value):
        inner, part = f"{path}.{field.name}" if path else field.name, getattr(value, field.name)
        default, make = field.default, field.default_factory
        default = make() if make is not dataclasses.MISSING else default
        found += [inner] if describe(part) == describe(default) else []
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            found += unset_fields(part, inner)
    return found


def differences(old: Any, new: Any, path: str = "", unset: Collection[str] = ()) -> list[str]:
    """Lines 'field: old -> new' where two descriptions differ, but for what a resume may change.

    A field that the old one does not know, because its class had none yet, may be among `unset`.
    """
    if any(path == name or (name.endswith(".") and path.startswith(name)) for name in RESUMABLE):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            inner = f"{path}.{key}" if path else key
            if key in old or inner not in unset:
                lines += differences(old.get(key), new.get(key), inner, unset)
        return lines
    if isinstance(old, list) and isinstance(new, str) and _sha(json.dumps(old)) in new:
        return []  # told in full when that run began
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
