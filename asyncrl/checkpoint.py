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
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

FORMAT = 1
TENSORS, STATE, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best"
MANIFEST_NBYTES = 64 << 20  # an honest one is far smaller; read whole before its sum is known
PIECE_NBYTES = 4 << 20
DTYPES = {np.dtype(bool): "BOOL", np.dtype("complex64"): "C64"} | {
    np.dtype(f"{kind}{nbytes}"): f"{kind.upper()}{8 * nbytes}"
    for kind, sizes in {"i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
    for nbytes in sizes
}
_CHECKPOINT = re.compile(r"checkpoint_(\d{12,18})")
_HIDDEN = re.compile(r"\.(checkpoint_\d{12,18}|best)\.(tmp|old)")
_SEGMENT = re.compile(r"segment_(\d{12,18})\.bin")  # no such name leads out of its folder


class CheckpointError(Exception):
    """Something could not be saved or must not be loaded; the message says what to do about it."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """Replace a file; a crash leaves the old content or the new, never a mixture.

    Raises OSError (disk full, no permission) with the old content untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        _write_file(temporary, [data])
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _fsync_folder(path.parent)


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
    event log; what is in `protect` (numbers) is never pruned.
    """

    def __init__(self, folder: str | Path, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.protect: set[int] = set()
        self.rejected: list[tuple[Path, str]] = []
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
        manifest["segments"] = _checked_segments(segments or [])
        contents = {TENSORS: _tensors_pieces(tensors), STATE: [json.dumps(state).encode()]}
        final = self.folder / (BEST if best else f"checkpoint_{number:012d}")
        temporary, old = _hidden(final, "tmp"), _hidden(final, "old")
        _self_sum(manifest)  # raises what is not JSON
        try:
            _make_folder(self.folder)
            self._sweep()
            os.mkdir(temporary)
            manifest["files"] = {n: _write_file(temporary / n, p) for n, p in contents.items()}
            manifest["sha256"] = _self_sum(manifest)
            _write_file(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            _fsync_folder(temporary)
            if final.exists():
                # No folder can be renamed over another. A crash between the two renames leaves the
                # old one whole under its hidden name, where readers look and _sweep restores it.
                os.rename(final, old)
            os.rename(temporary, final)
            _fsync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._sweep()
            room = sum(array.nbytes for array in tensors.values()) / 1e6
            raise CheckpointError(
                f"cannot save {final}: expected a writable folder with {room:.1f} MB free, got "
                f"{error}; older ones are untouched: make room or give permission, then save again"
            ) from error
        try:
            self._sweep()
            if not best:
                self._verdicts[number] = True
                self._prune()
        except OSError as error:  # the new one is safe; leftovers go with the next save
            self.rejected.append((self.folder, f"old checkpoints could not be removed: {error}"))
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

    def listed_segments(self) -> set[str]:
        """Names of the segment files any checkpoint here lists, for `delete_unlisted`."""
        listed = set()
        for path in [*self._folders().values(), _visible_or_old(self.folder / BEST)]:
            with contextlib.suppress(CheckpointError):  # an unreadable one will never be loaded
                listed |= {segment["file"] for segment in _read_manifest(path)["segments"]}
        return listed

    def clean(self) -> None:
        """Call at start: make the folder, remove what a crashed writer left, try a write.

        Raises CheckpointError where nothing can be written: such a run should not begin.
        """
        try:
            _make_folder(self.folder)
            self._sweep()
            write_atomically(self.folder / ".writable", b"x")
            os.unlink(self.folder / ".writable")
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
                _expect(loaded.number == number, f"{path}: expected its own number", loaded.number)
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
                # Hidden first: a crash halfway leaves rubbish to sweep, not a broken checkpoint.
                os.rename(path, gone := _hidden(path, "tmp"))
                shutil.rmtree(gone)

    def _sweep(self) -> None:
        for hidden in filter(None, map(_HIDDEN.fullmatch, os.listdir(self.folder))):
            path, visible = self.folder / hidden[0], self.folder / hidden[1]
            if hidden[2] == "old" and not visible.exists():
                os.rename(path, visible)
            else:
                shutil.rmtree(path)


class SegmentWriter:
    """Appends records of `record_nbytes` to files of about `segment_nbytes` in `folder`.

    An append costs a copy to the page cache and a running sum; a thread fsyncs full segments. Disk
    trouble never raises into training: the writer becomes `broken` (why, in words; None while
    well), drops records, and goes on after `restart()`. `resume`: the loaded checkpoint's segments;
    CheckpointError if one is missing or does not fit.
    """

    def __init__(
        self,
        folder: str | Path,
        record_nbytes: int,
        segment_nbytes: int = 64 << 20,
        resume: Iterable[dict] = (),
    ):
        self.folder = Path(folder)
        self.record_nbytes = record_nbytes
        self.broken: str | None = None
        self._segments = _checked_segments(list(resume), record_nbytes)
        _check_files(self.folder, self._segments)
        self._records_per_segment = max(1, segment_nbytes // record_nbytes)
        self._fd = -1  # of the open segment; -1: none is open
        self._open: dict = {}  # its listing so far
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="segments")
        self._syncing: list[Future] = []
        # Above every name in sight, also those that only a rejected checkpoint lists.
        names = [*self._files(), *self._names()]
        self._next_index = 1 + max((int(_SEGMENT.fullmatch(n)[1]) for n in names), default=-1)

    def append(self, buffer, base: dict) -> None:
        """Write one record: a contiguous buffer of `record_nbytes` bytes, free again on return.

        `base` (JSON): what a reader needs to start with this record; kept for each segment's first.
        """
        record = memoryview(buffer).cast("B")
        if record.nbytes != self.record_nbytes:
            raise ValueError(f"record: expected {self.record_nbytes} bytes, got {record.nbytes}")
        if self.broken:
            return
        try:
            if self._fd < 0:
                self._begin_segment(base)
            _write(self._fd, record)
        except OSError as error:
            self._break(str(error))
            return
        self._digest.update(record)
        self._open["records"] += 1
        if self._open["records"] == self._records_per_segment:
            self._end_segment()

    def flush(self) -> list[dict]:
        """Make all records durable; return the live segments for a manifest, oldest first.

        The open segment ends here, so nothing returned ever changes. Blocks for the fsyncs. Raises
        CheckpointError if the writer is broken or a file has vanished.
        """
        if self._fd >= 0:
            self._end_segment()
        self._hear(wait=True)
        if not self.broken and self._segments:
            try:
                _fsync_folder(self.folder)
                _check_files(self.folder, self._segments)
            except (OSError, CheckpointError) as error:
                self._break(str(error))
        if self.broken:
            raise CheckpointError(
                f"cannot save replay: expected {self.folder} to take segments, got {self.broken}; "
                "make room or give permission; restart() begins a new stream"
            )
        return [dict(segment) for segment in self._segments]

    def restart(self) -> None:
        """Begin a new stream: former segments leave the list; the next record opens a new one."""
        self._break("restarted")
        self._hear(wait=True)
        self._segments.clear()
        self.broken = None

    def forget_all_but(self, newest: int) -> None:
        """Unlist the oldest segments as long as the others hold the `newest` records."""
        num_records = sum(s["records"] for s in [*self._segments, self._open] if s)
        while self._segments and num_records - self._segments[0]["records"] >= newest:
            num_records -= self._segments.pop(0)["records"]

    def delete_unlisted(self, still_listed_files: Collection[str]) -> int:
        """Delete segment files that neither a manifest nor this writer lists; return how many.

        Call it at start and after each save, with `Checkpoints.listed_segments()`.
        """
        num_deleted = 0
        for name in self._files() - set(still_listed_files) - self._names():
            with contextlib.suppress(OSError):  # tried again next time
                os.unlink(self.folder / name)
                num_deleted += 1
        return num_deleted

    def close(self) -> None:
        """Let go of file and thread; records since the last flush are not promised."""
        self._break("closed")
        self._thread.shutdown()

    def _begin_segment(self, base: dict) -> None:
        base = json.loads(json.dumps(base))  # the caller's lists may change before the flush
        _make_folder(self.folder)
        name = f"segment_{self._next_index:012d}.bin"
        self._next_index += 1
        self._fd = _create(self.folder / name)
        self._open = {"file": name, "records": 0, "base": base}
        self._digest = hashlib.sha256()

    def _end_segment(self) -> None:
        nbytes = self._open["records"] * self.record_nbytes
        self._segments.append(self._open | {"nbytes": nbytes, "sha256": self._digest.hexdigest()})
        self._syncing.append(self._thread.submit(_sync_and_close, self._fd))
        self._fd, self._open = -1, {}
        self._hear(wait=False)

    def _hear(self, wait: bool) -> None:
        while self._syncing and (wait or self._syncing[0].done()):
            if error := self._syncing.pop(0).exception():  # a gap: the stream is worth nothing
                self._break(str(error))

    def _break(self, reason: str) -> None:
        self.broken = self.broken or reason
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        self._fd, self._open = -1, {}

    def _names(self) -> set[str]:
        return {segment["file"] for segment in [*self._segments, self._open] if segment}

    def _files(self) -> set[str]:
        with contextlib.suppress(OSError):
            return {name for name in os.listdir(self.folder) if _SEGMENT.fullmatch(name)}
        return set()


def read_segments(
    folder: str | Path, segments: list[dict], record_nbytes: int
) -> Iterator[tuple[memoryview, dict | None, bool]]:
    """Yield (record, base or None, first of its segment?) in the order they were appended.

    All sizes are checked before the first record, a segment's sum before its first; one segment at
    a time is in memory. Raises CheckpointError naming the file and the reason.
    """
    _check_files(Path(folder), _checked_segments(segments, record_nbytes))
    for segment in segments:
        data = memoryview(_read(Path(folder) / segment["file"], segment))
        for index in range(segment["records"]):
            record = data[index * record_nbytes : (index + 1) * record_nbytes]
            yield record, None if index else segment["base"], index == 0


def _expect(ok: bool, what: str, got: object) -> None:
    if not ok:
        raise CheckpointError(f"{what}, got {got!r:.200}")


def _check_entry(name: str, entry: Any) -> None:
    ok = isinstance(entry, dict) and type(entry.get("nbytes")) is int and entry["nbytes"] >= 0
    _expect(ok and isinstance(entry.get("sha256"), str), f"{name}: expected nbytes, sha256", entry)


def _checked_segments(segments: Any, record_nbytes: int | None = None) -> list[dict]:
    _expect(isinstance(segments, list), "segments: expected a list", segments)
    for segment in segments:
        ok = isinstance(segment, dict) and {"file", "records", "base"} <= set(segment)
        _expect(ok, "segment: expected file, records, base", segment)
        name, records = segment["file"], segment["records"]
        ok = isinstance(name, str) and _SEGMENT.fullmatch(name)
        _expect(bool(ok), "segment: expected a plain file name segment_<12 digits>.bin", name)
        _check_entry(name, segment)
        ok = type(records) is int and records > 0
        if record_nbytes is not None:
            ok = ok and segment["nbytes"] == records * record_nbytes
        _expect(ok, f"{name}: expected records of {record_nbytes} bytes (same config?)", segment)
    return [dict(segment) for segment in segments]


def _check_files(folder: Path, segments: list[dict]) -> None:
    for segment in segments:
        with _open(folder / segment["file"], segment["nbytes"]):
            pass


def _load(path: Path) -> Loaded:
    manifest = _read_manifest(path)
    files, number, created = manifest["files"], manifest["number"], manifest["created"]
    digest = hashlib.sha256()
    with _open(path / TENSORS, files[TENSORS]["nbytes"]) as file:
        while piece := file.read(PIECE_NBYTES):
            digest.update(piece)
    _check_sum(TENSORS, digest.hexdigest(), files[TENSORS])
    try:
        state, tensors = json.loads(_read(path / STATE, files[STATE])), _Tensors(path / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; use another") from error
    return Loaded(path, number, created, state, tensors, manifest["segments"])


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(_read(path / MANIFEST))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: is not JSON: {error}") from error
    _expect(isinstance(manifest, dict), f"{MANIFEST}: expected an object", manifest)
    version = manifest.get("format")
    what = f"{MANIFEST}: load it with the asyncrl that wrote it: expected format {FORMAT}"
    _expect(version == FORMAT, what, version)
    expected = manifest.pop("sha256", None)
    _expect(expected == _self_sum(manifest), f"{MANIFEST}: expected its own sum to match", expected)
    ok = type(manifest.get("number")) is int and isinstance(manifest.get("created"), float)
    _expect(ok, f"{MANIFEST}: expected number and created", manifest)
    files = manifest.get("files")  # exactly these two, so no name can lead out of the folder
    ok = isinstance(files, dict) and set(files) == {TENSORS, STATE}
    _expect(ok, f"{MANIFEST}: expected the files {TENSORS} and {STATE}", files)
    for name, entry in files.items():
        _check_entry(name, entry)
    _checked_segments(manifest.get("segments"))
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


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict:
    digest, nbytes, fd = hashlib.sha256(), 0, _create(path)
    try:
        for piece in pieces:
            _write(fd, piece)
            digest.update(piece)
            nbytes += len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"nbytes": nbytes, "sha256": digest.hexdigest()}


def _write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
        # Nobody reads it before a resume; the page cache is wanted elsewhere.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _open(path: Path, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a plain file of exactly `nbytes`; an OSError in the body becomes a CheckpointError."""
    try:
        # Neither a link to elsewhere nor a pipe that blocks.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            _expect(stat.S_ISREG(found.st_mode), f"{path.name}: expected a plain file", found)
            ok = found.st_size == nbytes if nbytes is not None else found.st_size < MANIFEST_NBYTES
            limit = nbytes if nbytes is not None else f"at most {MANIFEST_NBYTES}"
            _expect(ok, f"{path.name}: expected {limit} bytes", found.st_size)
            yield file
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error}") from error


def _read(path: Path, entry: dict | None = None) -> bytes:
    with _open(path, entry and entry["nbytes"]) as file:
        data = file.read()
    if entry:
        _check_sum(path.name, hashlib.sha256(data).hexdigest(), entry)
    return data


def _check_sum(name: str, digest: str, entry: dict) -> None:
    expected = entry["sha256"]
    _expect(digest == expected, f"{name}: damaged: expected SHA-256 {expected}", digest)


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")


def _visible_or_old(path: Path) -> Path:
    old = _hidden(path, "old")
    return old if old.exists() and not path.exists() else path


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        os.makedirs(folder, exist_ok=True)
        _fsync_folder(folder.parent)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
