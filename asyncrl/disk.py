"""Files that are whole or not there: what checkpoints and replay segments stand on."""

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST_NBYTES = 64 << 20  # an honest one is far smaller; read whole before its sum is known
PIECE_NBYTES = 4 << 20


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
        write_file(temporary, [data])
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_folder(path.parent)


def expect(ok: bool, what: str, got: object) -> None:
    if not ok:
        raise CheckpointError(f"{what}, got {got!r:.200}")


def check_entry(name: str, entry: Any) -> None:
    ok = isinstance(entry, dict) and type(entry.get("nbytes")) is int and entry["nbytes"] >= 0
    expect(ok and isinstance(entry.get("sha256"), str), f"{name}: expected nbytes, sha256", entry)


def check_sum(name: str, digest: str, entry: dict) -> None:
    expected = entry["sha256"]
    expect(digest == expected, f"{name}: damaged: expected SHA-256 {expected}", digest)


def create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict:
    digest, nbytes, fd = hashlib.sha256(), 0, create(path)
    try:
        for piece in pieces:
            write(fd, piece)
            digest.update(piece)
            nbytes += len(piece)
        os.fsync(fd)
    finally:
        os.close(fd)
    return {"nbytes": nbytes, "sha256": digest.hexdigest()}


def write(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
        # Nobody reads it before a resume; the page cache is wanted elsewhere.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@contextlib.contextmanager
def open_checked(path: Path, nbytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a plain file of exactly `nbytes`; an OSError in the body becomes a CheckpointError."""
    try:
        # Neither a link to elsewhere nor a pipe that blocks.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            expect(stat.S_ISREG(found.st_mode), f"{path.name}: expected a plain file", found)
            ok = found.st_size == nbytes if nbytes is not None else found.st_size < MANIFEST_NBYTES
            limit = nbytes if nbytes is not None else f"at most {MANIFEST_NBYTES}"
            expect(ok, f"{path.name}: expected {limit} bytes", found.st_size)
            yield file
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error}") from error


def read_checked(path: Path, entry: dict | None = None) -> bytes:
    with open_checked(path, entry and entry["nbytes"]) as file:
        data = file.read()
    if entry:
        check_sum(path.name, hashlib.sha256(data).hexdigest(), entry)
    return data


def make_folder(folder: Path) -> None:
    if not folder.is_dir():
        os.makedirs(folder, exist_ok=True)
        fsync_folder(folder.parent)


def remove(path: Path) -> None:
    """Remove a file, a link itself, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
