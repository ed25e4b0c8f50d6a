"""Checkpoints and replay segments on disk: atomic, checksummed, nothing unpickled.

A checkpoint is one folder, written under a hidden name, fsynced and renamed: it is there whole or
not at all. Its manifest carries the size and SHA-256 sum of every file, and a sum of itself. Replay
records stream into immutable segment files; manifests list them; what none lists is deleted.

    checkpoint_000000012345/      (best/ has the same files)
        tensors.safetensors  state.json  manifest.json
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from asyncrl.disk import (
    PIECE_NBYTES,
    CheckpointError,
    check_entry,
    check_sum,
    expect,
    fsync_folder,
    make_folder,
    open_checked,
    read_checked,
    remove,
    write_atomically,
    write_file,
)
from asyncrl.segments import checked_segments

FORMAT = 1
TENSORS, STATE, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best"
DTYPES = {np.dtype(bool): "BOOL", np.dtype("complex64"): "C64"} | {
    np.dtype(f"{kind}{nbytes}"): f"{kind.upper()}{8 * nbytes}"
    for kind, sizes in {"i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
    for nbytes in sizes
}
_CHECKPOINT = re.compile(r"checkpoint_(\d{12,18})")
_HIDDEN = re.compile(r"\.(checkpoint_\d{12,18}|best)\.(tmp|old)")


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint. `tensors` reads each array when it is asked for."""

    path: Path
    number: int
    created: float  # seconds since 1970
    state: dict
    tensors: Mapping[str, np.ndarray]
    segments: list[dict]


class Checkpoints:
    """The checkpoints of one run: the `keep` newest valid ones, and one called best.

    One process writes, others may read meanwhile. `rejected` lists (path, reason in words) for the
    event log, `leftovers` says what the newest save could not remove, and why; what is in `protect`
    (numbers) is never pruned.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.protect: set[int] = set()
        self.rejected: list[tuple[Path, str]] = []
        self.leftovers: list[str] = []
        self._verdicts: dict[int, bool] = {}  # number -> valid, as written or found by this object

    def save(
        self,
        number: int,
        tensors: Mapping[str, np.ndarray],
        state: dict,
        segments: list[dict] | None = None,
        best: bool = False,
    ) -> Path:
        """Write a checkpoint and return its folder, which from then on survives a power cut.

        `number` grows with training; saving a number again replaces it. `state` is JSON (so keys
        become strings, tuples lists). `best` replaces the best one and prunes nothing. Raises
        CheckpointError when the disk refuses, with all older ones untouched, and TypeError or
        ValueError, before the disk is touched, for what can never be saved.
        """
        if not 0 <= number < 10**18:
            raise ValueError(f"number: expected 0 <= number < 10**18, got {number}")
        manifest: dict[str, Any] = {"format": FORMAT, "number": number, "created": time.time()}
        manifest["segments"] = checked_segments(segments or [])
        contents = {TENSORS: _tensors_pieces(tensors), STATE: [json.dumps(state).encode()]}
        final = self.folder / (BEST if best else f"checkpoint_{number:012d}")
        temporary, old = _hidden(final, "tmp"), _hidden(final, "old")
        _self_sum(manifest)  # raises what is not JSON
        try:
            make_folder(self.folder)
            self._sweep(best)
            os.mkdir(temporary)
            manifest["files"] = {n: write_file(temporary / n, p) for n, p in contents.items()}
            manifest["sha256"] = _self_sum(manifest)
            write_file(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            fsync_folder(temporary)
            if os.path.lexists(final):
                # No folder can be renamed over another. A crash between the two renames leaves the
                # old one whole under its hidden name, where readers look and _sweep restores it.
                os.rename(final, old)
            os.rename(temporary, final)
            fsync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._sweep(best)
            room = sum(array.nbytes for array in tensors.values()) / 1e6
            raise CheckpointError(
                f"cannot save {final}: expected a writable folder with {room:.1f} MB free, got "
                f"{error}; older ones are untouched: make room or give permission, then save again"
            ) from error
        try:
            self._sweep(best)
            if not best:
                self._verdicts[number] = True
                self._prune()
        except OSError as error:  # the new one is safe
            self.leftovers.append(f"old ones could not be removed: {error}")
        return final

    def newest_valid(self) -> Loaded | None:
        """The newest checkpoint whose every size and sum is right, or None where there is none.

        Segments are left to `read_segments`; who is refused there calls `reject` and asks again.
        """
        for number, path in sorted(self._folders().items(), reverse=True):
            if self._verdicts.get(number, True) and (loaded := self._try(path, number)):
                return loaded
        return None

    def best(self) -> Loaded | None:
        """The checkpoint saved with `best=True`, or None where there is no valid one."""
        for _ in range(2):  # the writer may replace it while we read
            path = _visible_or_old(self.folder / BEST)
            if path.exists() and (loaded := self._try(path)):
                return loaded
        return None

    def reject(self, loaded: Loaded, reason: str) -> None:
        """Have `newest_valid` pass over a checkpoint that the caller found unusable."""
        self.rejected.append((loaded.path, reason))
        self._verdicts[loaded.number] = False

    def listed_segments(self, newest: int | None = None) -> set[str]:
        """Names of the segment files that the newest checkpoints list (None: all of them), for
        `delete_unlisted`. An older one that has lost its segments is used without its replay; those
        known to be invalid, which are never loaded, do not count. OSError where one cannot be read
        for now."""
        listed: list[set[str]] = []
        os.stat(self.folder)  # or a folder out of sight would list nothing
        for number, path in sorted(self._folders().items(), reverse=True):
            if self._verdicts.get(number, True) and len(listed) != newest:
                try:
                    manifest = _read_manifest(path)
                except CheckpointError as error:
                    if isinstance(cause := error.__cause__, OSError):  # not damaged, perhaps
                        raise cause from None
                    continue
                listed.append({segment["file"] for segment in manifest["segments"]})
        return set().union(*listed)

    def clean(self, best: bool = False) -> None:
        """Call at start: make the folder, remove what a crashed writer left, try a write.

        `best`: of the best one, which another process may write than the others. Raises
        CheckpointError where nothing can be written: such a run should not begin.
        """
        try:
            make_folder(self.folder)
            self._sweep(best)
            probe = self.folder / (".writable_best" if best else ".writable")
            write_atomically(probe, b"x")
            os.unlink(probe)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints: expected {self.folder} to be writable, got {error}; "
                "make room, give permission or choose another folder"
            ) from error

    def _folders(self) -> dict[int, Path]:
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return {}
        names = {hidden[1] if (hidden := _HIDDEN.fullmatch(name)) else name for name in names}
        matches = filter(None, map(_CHECKPOINT.fullmatch, names))
        paths = {int(match[1]): _visible_or_old(self.folder / match[0]) for match in matches}
        return {number: path for number, path in paths.items() if path.exists()}

    def _try(self, path: Path, number: int | None = None) -> Loaded | None:
        try:
            loaded = _load(path)
            if number is not None:
                expect(loaded.number == number, f"{path}: expected its own number", loaded.number)
        except CheckpointError as error:
            loaded = None
            if (path, str(error)) not in self.rejected:
                self.rejected.append((path, str(error)))
        if number is not None:
            self._verdicts[number] = loaded is not None
        return loaded

    def _prune(self) -> None:
        num_valid = 0
        for number, path in sorted(self._folders().items(), reverse=True):
            if num_valid < self.keep:
                if number not in self._verdicts:
                    self._try(path, number)
                num_valid += self._verdicts[number]
            elif number not in self.protect:
                self._remove(path)

    def _sweep(self, best: bool) -> None:
        """Leftovers of one kind: the best one may have another writer than the others."""
        self.leftovers.clear()
        for hidden in filter(None, map(_HIDDEN.fullmatch, os.listdir(self.folder))):
            if (hidden[1] == BEST) != best:
                continue
            path, visible = self.folder / hidden[0], self.folder / hidden[1]
            if hidden[2] == "old" and not visible.exists():
                os.rename(path, visible)
            else:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        """What cannot be removed is in no other one's way, and is tried again at the next save."""
        try:
            if not _HIDDEN.fullmatch(path.name):
                # Hidden first: a crash halfway leaves rubbish to sweep, not a broken checkpoint.
                os.rename(path, gone := _hidden(path, "tmp"))
                path = gone
            remove(path)
        except OSError as error:
            self.leftovers.append(f"{path.name} could not be removed: {error}")


def _load(path: Path) -> Loaded:
    manifest = _read_manifest(path)
    files, number, created = manifest["files"], manifest["number"], manifest["created"]
    digest = hashlib.sha256()
    with open_checked(path / TENSORS, files[TENSORS]["nbytes"]) as file:
        while piece := file.read(PIECE_NBYTES):
            digest.update(piece)
    check_sum(TENSORS, digest.hexdigest(), files[TENSORS])
    try:
        state, tensors = (
            json.loads(read_checked(path / STATE, files[STATE])),
            _Tensors(path / TENSORS),
        )
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another") from error
    return Loaded(path, number, created, state, tensors, manifest["segments"])


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(read_checked(path / MANIFEST))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: is not JSON: {error}") from error
    expect(isinstance(manifest, dict), f"{MANIFEST}: expected an object", manifest)
    version = manifest.get("format")
    what = f"{MANIFEST}: load it with the asyncrl that wrote it: expected format {FORMAT}"
    expect(version == FORMAT, what, version)
    expected = manifest.pop("sha256", None)
    expect(expected == _self_sum(manifest), f"{MANIFEST}: expected its own sum to match", expected)
    ok = type(manifest.get("number")) is int and isinstance(manifest.get("created"), float)
    expect(ok, f"{MANIFEST}: expected number and created", manifest)
    files = manifest.get("files")  # exactly these two, so no name can lead out of the folder
    ok = isinstance(files, dict) and set(files) == {TENSORS, STATE}
    expect(ok, f"{MANIFEST}: expected the files {TENSORS} and {STATE}", files)
    for name, entry in files.items():
        check_entry(name, entry)
    checked_segments(manifest.get("segments"))
    return manifest


def _self_sum(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


class _Tensors(Mapping):
    def __init__(self, path: Path):
        self._file = safe_open(path, framework="numpy")  # its header is held against its size
        self._names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)


def _tensors_pieces(tensors: Mapping[str, np.ndarray]) -> Iterator[bytes | memoryview]:
    """The safetensors format by hand: the library copies every tensor before it writes any."""
    arrays = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # aligned
    header, offset = {}, 0
    for name, array in arrays:
        if (dtype := DTYPES.get(array.dtype.newbyteorder("="))) is None or name == "__metadata__":
            raise TypeError(f"tensor {name!r}: expected a numeric dtype, got {array.dtype}")
        offsets = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def pieces():
        yield len(text).to_bytes(8, "little") + text
        for _, array in arrays:
            array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            data = array.reshape(-1).view(np.uint8)
            for start in range(0, data.nbytes, PIECE_NBYTES):
                yield data[start : start + PIECE_NBYTES].data

    return pieces()  # not a generator itself, so that TypeError comes before anything is written


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _visible_or_old(path: Path) -> Path:
    old = _hidden(path, "old")
    return old if old.exists() and not path.exists() else path
