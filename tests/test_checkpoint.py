"""Checkpoints and segments against crashes, full disks, damage and malice (FAULTS 14 to 19)."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl import checkpoint
from asyncrl.checkpoint import Checkpoints
from asyncrl.disk import PIECE_NBYTES, CheckpointError, write_atomically
from asyncrl.segments import SegmentWriter, read_segments

FILES = ["tensors.safetensors", "state.json", "manifest.json"]
RECORD = 16


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Durability against power cuts cannot be tested here; its cost can be saved."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def tensors_of(number):
    return {"w": np.full((3, 5), number, np.float32), "step": np.array(number)}


def save(checkpoints, number, **options):
    return checkpoints.save(number, tensors_of(number), {"number": number}, **options)


def assert_is(loaded, number):
    assert loaded.number == loaded.state["number"] == number
    assert set(loaded.tensors) == {"w", "step"}
    for name, array in tensors_of(number).items():
        np.testing.assert_array_equal(loaded.tensors[name], array)


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def forge(path, **fields):
    """Rewrite a manifest with a self sum that holds, as somebody hostile would."""
    manifest = json.loads((path / "manifest.json").read_text()) | fields
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))


def replace_file(path, name, data):
    (path / name).write_bytes(data)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"nbytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(path, files=files)


def add_file(path, name):
    files = json.loads((path / "manifest.json").read_text())["files"]
    forge(path, files=files | {name: files["state.json"]})


# Round trips


def test_every_dtype_and_shape_comes_back(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype} {shape}": rng.integers(0, 2**8, shape).astype(dtype)
        for dtype in checkpoint.DTYPES
        for shape in [(), (0, 3), (7,), (2, 3, 5)]
    }
    assert len(tensors) == 13 * 4
    tensors["a view"] = np.arange(40, dtype=np.int16).reshape(5, 8)[::2, ::-3]
    tensors["big-endian"] = np.arange(3, dtype=">f8")
    tensors["several pieces"] = rng.integers(0, 256, PIECE_NBYTES + 3, dtype=np.uint8)
    state = {"nested": [1, None, {"é": 0.1}], "large": 2**70, "nan": float("inf")}
    path = Checkpoints(tmp_path).save(1, tensors, state)
    loaded = Checkpoints(tmp_path).newest_valid()
    assert (loaded.path, loaded.state, loaded.segments) == (path, state, [])
    assert set(loaded.tensors) == set(tensors)
    for name, array in tensors.items():
        got = loaded.tensors[name]
        assert (got.dtype, got.shape) == (array.dtype.newbyteorder("="), array.shape)
        np.testing.assert_array_equal(got, array)


def test_the_file_is_what_the_safetensors_library_reads(tmp_path):
    from safetensors.numpy import load_file

    path = save(Checkpoints(tmp_path), 3)
    np.testing.assert_array_equal(load_file(path / "tensors.safetensors")["w"], tensors_of(3)["w"])


@pytest.mark.parametrize("bad", [np.array([object()]), np.array(["text"]), np.array([1 + 1j])])
def test_what_can_never_be_saved_is_refused_before_the_disk_is_touched(tmp_path, bad):
    checkpoints = Checkpoints(tmp_path / "new")
    with pytest.raises(TypeError, match="'x': expected a numeric dtype"):
        checkpoints.save(1, {"x": bad}, {})
    with pytest.raises(TypeError):
        checkpoints.save(1, {}, {"x": object()})
    with pytest.raises(ValueError, match="got -1"):
        checkpoints.save(-1, {}, {})
    assert not (tmp_path / "new").exists()


def test_loaded_tensors_survive_the_pruning_of_their_folder(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    loaded = Checkpoints(tmp_path).newest_valid()
    save(checkpoints, 2)
    assert not loaded.path.exists()
    assert_is(loaded, 1)


# Rotation and best


def test_rotation_keeps_the_newest_the_protected_and_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.protect.add(20)
    for number in [10, 20, 30, 40, 50]:
        save(checkpoints, number, best=number == 10)
        save(checkpoints, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best"] + [
        f"checkpoint_{number:012d}" for number in [20, 40, 50]
    ]
    assert_is(checkpoints.newest_valid(), 50)
    assert_is(checkpoints.best(), 10)
    save(checkpoints, 5, best=True)  # not the largest number: the last word counts
    assert_is(checkpoints.best(), 5)
    assert hidden(tmp_path) == []


def test_saving_a_number_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 7)
    checkpoints.save(7, {}, {"again": True})
    assert checkpoints.newest_valid().state == {"again": True}
    assert len(list(tmp_path.iterdir())) == 1


def test_broken_ones_do_not_count_as_kept(tmp_path):
    for number in [1, 2, 3]:
        save(Checkpoints(tmp_path), number)
    (tmp_path / "checkpoint_000000000002" / "state.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 4)
    assert (tmp_path / "checkpoint_000000000001").exists()
    save(checkpoints, 5)
    save(checkpoints, 6)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["4", "5", "6"]


def test_nothing_there(tmp_path):
    checkpoints = Checkpoints(tmp_path / "missing")
    assert checkpoints.newest_valid() is checkpoints.best() is None
    with pytest.raises(FileNotFoundError):  # it may be out of sight only
        checkpoints.listed_segments()
    checkpoints.clean()
    assert checkpoints.newest_valid() is None and checkpoints.rejected == []


# Damage


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "a flipped bit": flip,
}


@pytest.mark.fault_15
@pytest.mark.fault_16
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_makes_the_one_before_be_used_and_is_named(tmp_path, name, damage):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    (path / name).write_bytes(DAMAGE[damage]((path / name).read_bytes()))
    reader = Checkpoints(tmp_path)
    assert_is(reader.newest_valid(), 1)
    [(rejected, reason)] = reader.rejected
    assert rejected == path and name in reason
    assert_is(reader.newest_valid(), 1)
    assert len(reader.rejected) == 1  # said once


def test_a_damaged_best_is_none_and_said_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (save(checkpoints, 1, best=True) / "state.json").write_text("{}")
    assert checkpoints.best() is None and len(checkpoints.rejected) == 1


@pytest.mark.fault_15
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_makes_the_one_before_be_used(tmp_path, name):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    (save(checkpoints, 2) / name).unlink()
    assert_is(Checkpoints(tmp_path).newest_valid(), 1)


def test_no_flipped_bit_of_a_manifest_changes_what_is_loaded(tmp_path):
    path = save(Checkpoints(tmp_path), 2, segments=[segment_entry()])
    good = (path / "manifest.json").read_bytes()
    expected, num_refused = checkpoint._read_manifest(path), 0
    with open(path / "manifest.json", "r+b", buffering=0) as file:
        for bit in range(8 * len(good)):
            at, mask = bit // 8, 1 << bit % 8
            os.pwrite(file.fileno(), bytes([good[at] ^ mask]), at)
            try:
                # The last digits of a time may mean the same float.
                assert checkpoint._read_manifest(path) == expected
            except CheckpointError:
                num_refused += 1
            os.pwrite(file.fileno(), good[at : at + 1], at)
    assert num_refused > 8 * len(good) - 40


def test_the_caller_may_reject_one(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    checkpoints.reject(checkpoints.newest_valid(), "its segments are gone")
    assert_is(checkpoints.newest_valid(), 1)
    assert checkpoints.rejected[0][1] == "its segments are gone"


# Crashes


CALLS = ["open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"]


def run_until_call(action, fatal):
    """Run `action` in a child killed at its system call number `fatal`; True if it finished."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    count = 0

    def counted(name, call):
        def wrapper(*args, **kwargs):
            nonlocal count
            if count == fatal:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os._exit(9)
            count += 1
            return call(*args, **kwargs)

        return wrapper

    try:
        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


SAVES = {
    "rotate": lambda c: save(c, 3),
    "replace": lambda c: c.save(2, tensors_of(2), {"number": 2}),
    "best": lambda c: save(c, 3, best=True),
    "clean": lambda c: (c.clean(), c.clean(best=True)),
}


@pytest.mark.fault_14
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork: the child only touches files
@pytest.mark.parametrize("action", SAVES)
def test_a_crash_at_any_system_call_leaves_a_valid_checkpoint_and_best(tmp_path, action):
    seed = Checkpoints(tmp_path / "seed", keep=2)
    for number in [1, 2]:
        save(seed, number, best=number == 1)
        save(seed, number)
    if action == "clean":
        shutil.copytree(seed.folder / "best", seed.folder / ".checkpoint_000000000003.tmp")
        (seed.folder / "best").rename(seed.folder / ".best.old")
    for fatal in range(1000):
        folder = tmp_path / str(fatal)
        shutil.copytree(seed.folder, folder)
        finished = run_until_call(lambda: SAVES[action](Checkpoints(folder, keep=2)), fatal)  # noqa: B023
        before, after = Checkpoints(folder), Checkpoints(folder)
        news = [loaded.number for loaded in (before.newest_valid(), before.best())]
        assert news in [[2, 1], [3, 1] if action == "rotate" else [2, 3 if action == "best" else 1]]
        after.clean()
        after.clean(best=True)
        assert hidden(folder) == []
        assert [loaded.number for loaded in (after.newest_valid(), after.best())] == news
        assert before.rejected == after.rejected == []
        for path in folder.iterdir():  # also of what was being pruned, no half is left
            checkpoint._load(path)
        save(after, 4)
        assert_is(after.newest_valid(), 4)
        if finished:
            break
    assert finished and fatal > (10 if action == "clean" else 20)


def test_a_learner_that_starts_leaves_the_best_one_to_its_writer(tmp_path, monkeypatch):
    evaluator, learner = Checkpoints(tmp_path), Checkpoints(tmp_path)
    save(evaluator, 1, best=True)
    calls = []

    def rename(*arguments, call=os.rename):
        call(*arguments)
        calls.append(arguments)
        if len(calls) == 1:  # the old one is hidden, the new one not yet in its place
            learner.clean()

    monkeypatch.setattr(os, "rename", rename)
    save(evaluator, 2, best=True)
    assert_is(evaluator.best(), 2)
    assert len(calls) > 2


# Disks that refuse


def failing(number):
    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("write", errno.ENOSPC),
        ("fsync", errno.EIO),
        ("mkdir", errno.EROFS),
        ("rename", errno.EACCES),
        ("open", errno.EMFILE),
    ],
)
def test_a_refused_save_leaves_the_older_ones_and_no_temporary(
    tmp_path, monkeypatch, name, number, best
):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, best=best)
    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing(number))
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            save(checkpoints, 2, best=best)
    checkpoints.clean(best)
    assert_is(checkpoints.best() if best else checkpoints.newest_valid(), 1)
    assert hidden(tmp_path) == []
    save(checkpoints, 3)
    assert_is(checkpoints.newest_valid(), 3)


def test_a_file_too_large_for_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError, match=r"0\.4 MB free.*File too large.*save again"):
            checkpoints.save(2, {"x": np.zeros(100_000, np.float32)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000000000001"]


def test_a_failed_second_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, best=True)
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError):
        save(checkpoints, 2, best=True)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert_is(checkpoints.best(), 1)


def test_a_removed_folder_is_made_anew(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a" / "b")
    save(checkpoints, 1)
    shutil.rmtree(tmp_path / "a")
    save(checkpoints, 2)
    assert_is(checkpoints.newest_valid(), 2)


def test_a_save_stands_even_if_pruning_is_refused(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    monkeypatch.setattr(shutil, "rmtree", failing(errno.EACCES))
    save(checkpoints, 2)
    assert checkpoints.leftovers == [
        ".checkpoint_000000000001.tmp could not be removed: [Errno 13] Permission denied"
    ]
    assert_is(checkpoints.newest_valid(), 2)
    monkeypatch.undo()
    save(checkpoints, 3)
    assert checkpoints.leftovers == hidden(tmp_path) == []


def test_what_is_no_folder_is_removed_like_one(tmp_path):
    checkpoints, elsewhere = Checkpoints(tmp_path / "a", keep=2), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    for number in (1, 2, 3):
        save(checkpoints, number)
    shutil.rmtree(checkpoints.folder / "checkpoint_000000000002")
    (checkpoints.folder / "checkpoint_000000000002").write_text("not a folder")
    (checkpoints.folder / ".checkpoint_000000000009.tmp").symlink_to(elsewhere)
    (checkpoints.folder / "checkpoint_000000000005").symlink_to(tmp_path / "nowhere")
    for number in (4, 5, 6):
        save(checkpoints, number)
        assert checkpoints.leftovers == hidden(checkpoints.folder) == []
    left = sorted(path.name for path in checkpoints.folder.iterdir())
    assert left == ["checkpoint_000000000005", "checkpoint_000000000006"]
    assert (elsewhere / "file").read_text() == "mine"


@pytest.mark.parametrize("best", [False, True])
def test_a_leftover_that_cannot_be_removed_stops_no_save_of_another_name(
    tmp_path, monkeypatch, best
):
    checkpoints, rmtree = Checkpoints(tmp_path, keep=1), shutil.rmtree
    save(checkpoints, 2, best=True)
    stuck = tmp_path / (".best.old" if best else ".checkpoint_000000000001.tmp")
    stuck.mkdir()

    def busy(path, *args, **kwargs):
        if Path(path) == stuck:
            raise OSError(errno.EBUSY, "held")
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", busy)
    for number in (3, 4):
        save(checkpoints, number)
        assert_is(checkpoints.newest_valid(), number)
    checkpoints.clean(best)
    assert checkpoints.leftovers == [f"{stuck.name} could not be removed: [Errno 16] held"]
    assert hidden(tmp_path) == [stuck.name]
    visible = sorted(path.name for path in tmp_path.iterdir() if path != stuck)
    assert visible == ["best", "checkpoint_000000000004"]


def test_clean_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="to be writable"):
        Checkpoints(tmp_path / "file").clean()
    monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
    with pytest.raises(CheckpointError, match="No space left"):
        Checkpoints(tmp_path).clean()
    assert hidden(tmp_path) == []


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"] and path.read_bytes() == b"new"


# Malice


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def segment_entry(**fields):
    entry = {"file": "segment_000000000000.bin", "records": 1, "base": {}, "nbytes": RECORD}
    return entry | {"sha256": "0" * 64} | fields


def header(entry):
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text


ABSURD = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 1 << 60]}
HOSTILE = {
    "pickled state": lambda p: replace_file(p, "state.json", pickle.dumps(Bomb())),
    "pickled tensors": lambda p: replace_file(p, "tensors.safetensors", pickle.dumps(Bomb())),
    "pickled manifest": lambda p: (p / "manifest.json").write_bytes(pickle.dumps(Bomb())),
    "deep state": lambda p: replace_file(p, "state.json", b"[" * 1_000_000),
    "deep manifest": lambda p: (p / "manifest.json").write_bytes(b"[" * 1_000_000),
    "no object": lambda p: (p / "manifest.json").write_bytes(b"3"),
    "absurd header": lambda p: replace_file(p, "tensors.safetensors", b"\xff" * 7 + b"\0{}"),
    "absurd tensor": lambda p: replace_file(p, "tensors.safetensors", header(ABSURD)),
    "absurd size": lambda p: forge(
        p, files={name: {"nbytes": 1 << 60, "sha256": "0"} for name in FILES[:2]}
    ),
    "sizes of another type": lambda p: forge(
        p, files={name: {"nbytes": "9"} for name in FILES[:2]}
    ),
    "parent folder": lambda p: add_file(p, "../state.json"),
    "absolute path": lambda p: add_file(p, "/etc/passwd"),
    "another number": lambda p: forge(p, number=5),
    "number of another type": lambda p: forge(p, number="2"),
    "no time": lambda p: forge(p, created=None),
    "no segments": lambda p: forge(p, segments=None),
    "segment elsewhere": lambda p: forge(p, segments=[segment_entry(file="../segment_0.bin")]),
    "segment with slash": lambda p: forge(p, segments=[segment_entry(file="a/b")]),
    "segment absolute": lambda p: forge(p, segments=[segment_entry(file="/etc/passwd")]),
    "segment without figures": lambda p: forge(p, segments=[{"file": "segment_000000000000.bin"}]),
    "segment of none": lambda p: forge(p, segments=[segment_entry(records=-1)]),
    "link": lambda p: ((p / "state.json").rename(p / "s"), (p / "state.json").symlink_to("s")),
    "pipe": lambda p: ((p / "state.json").unlink(), os.mkfifo(p / "state.json")),
    "huge manifest": lambda p: os.truncate(p / "manifest.json", 1 << 40),
    "future format": lambda p: forge(p, format=2),
}


@pytest.mark.fault_19
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_checkpoint_is_refused_in_words(tmp_path, attack):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    HOSTILE[attack](path)
    reader = Checkpoints(tmp_path)
    assert_is(reader.newest_valid(), 1)
    [(_, reason)] = reader.rejected
    assert len(reason) < 1000
    if attack == "future format":
        assert "expected format 1, got 2" in reason
    if attack in ("absurd size", "link", "pipe"):
        assert "state.json" in reason or "tensors.safetensors" in reason


# Segments


def record_of(index):
    return index.to_bytes(RECORD, "little")


def contents(folder, segments):
    return [int.from_bytes(r, "little") for r, _, _ in read_segments(folder, segments, RECORD)]


def append(writer, *indices):
    for index in indices:
        writer.append(record_of(index), {"index": index})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 5 * RECORD),
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 9)),
            st.tuples(st.just("forget"), st.integers(0, 12)),
            st.tuples(st.sampled_from(["flush", "resume", "restart"]), st.just(0)),
        ),
        max_size=12,
    ),
)
def test_segments_give_back_what_was_appended(tmp_path_factory, segment_nbytes, steps):
    folder = tmp_path_factory.mktemp("replay")
    writer = SegmentWriter(folder, RECORD, segment_nbytes)
    index = needed = start = 0  # the records needed..index must come back; start..index may
    published = {}
    for step, amount in [*steps, ("flush", 0)]:
        if step == "append":
            append(writer, *range(index, index + amount))
            index += amount
        elif step == "forget":
            writer.forget_all_but(amount)
            needed = max(needed, index - amount)
        elif step == "restart":
            writer.restart()
            needed = start = index
        else:
            segments = writer.flush()
            got = contents(folder, segments)
            assert got == list(range(got[0] if got else index, index))
            assert start <= index - len(got) <= needed
            bases = [b for _, b, first in read_segments(folder, segments, RECORD) if first]
            sizes = np.cumsum([0] + [segment["records"] for segment in segments])
            assert [base["index"] for base in bases] == [got[at] for at in sizes[:-1]]
            for segment in segments:  # what was listed never changes while it is there
                assert published.setdefault(segment["file"], segment) == segment
            if step == "resume":
                writer.close()
                writer = SegmentWriter(folder, RECORD, segment_nbytes, resume=segments)
            writer.delete_unlisted(set())
            assert {p.name for p in folder.iterdir()} == {segment["file"] for segment in segments}
            published = {segment["file"]: segment for segment in segments}
    writer.close()


def test_forgetting_drops_all_dead_segments_and_no_others(tmp_path):
    writer = SegmentWriter(tmp_path, RECORD, 2 * RECORD)
    append(writer, *range(7))
    writer.forget_all_but(4)
    assert contents(tmp_path, writer.flush()) == [2, 3, 4, 5, 6]
    writer.forget_all_but(0)
    assert writer.flush() == []
    writer.close()


def test_a_segment_lives_as_long_as_a_kept_manifest_lists_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    writer = SegmentWriter(tmp_path / "replay", RECORD, RECORD)
    for number in range(4):
        append(writer, number)
        writer.forget_all_but(1)
        save(checkpoints, number, segments=writer.flush())
        writer.delete_unlisted(checkpoints.listed_segments())
        loaded = Checkpoints(checkpoints.folder).newest_valid()
        assert contents(writer.folder, loaded.segments) == [number]
    append(writer, 9)  # lost in a crash before any manifest lists it
    writer.close()
    assert sorted(int(p.name[8:-4]) for p in writer.folder.iterdir()) == [2, 3, 4]
    again = SegmentWriter(writer.folder, RECORD, RECORD, resume=loaded.segments)
    assert again.delete_unlisted(checkpoints.listed_segments()) == 1
    append(again, 10)
    assert contents(writer.folder, again.flush()) == [3, 10]
    again.close()


def test_segments_of_invalid_checkpoints_do_not_stand_for_those_of_valid_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    names = [f"segment_{number:012d}.bin" for number in range(5)]
    for number, name in enumerate(names):
        save(checkpoints, number, segments=[segment_entry(file=name)])
    assert checkpoints.listed_segments(newest=2) == set(names[3:])
    for number in (3, 4):
        (tmp_path / f"checkpoint_{number:012d}" / "state.json").write_text("")
    again = Checkpoints(tmp_path)
    assert_is(again.newest_valid(), 2)
    assert again.listed_segments(newest=1) == {names[2]}
    assert again.listed_segments(newest=2) == set(names[1:3])
    assert again.listed_segments() == set(names[:3])


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
def test_a_damaged_segment_is_named(tmp_path, damage):
    writer = SegmentWriter(tmp_path, RECORD, 2 * RECORD)
    append(writer, *range(4))
    segments = writer.flush()
    writer.close()
    path = tmp_path / segments[1]["file"]
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(DAMAGE[damage](data))
    with pytest.raises(CheckpointError, match=path.name):
        contents(tmp_path, segments)
    if damage != "a flipped bit":  # a resume looks at sizes only; the sums come with the reading
        with pytest.raises(CheckpointError, match=path.name):
            SegmentWriter(tmp_path, RECORD, resume=segments)


def test_segments_of_another_configuration_are_refused(tmp_path):
    writer = SegmentWriter(tmp_path, RECORD)
    append(writer, 1)
    segments = writer.flush()
    writer.close()
    with pytest.raises(CheckpointError, match="records of 8 bytes"):
        next(read_segments(tmp_path, segments, 8))
    with pytest.raises(ValueError, match="expected 16 bytes, got 8"):
        writer.append(b"8" * 8, {})


def test_the_base_is_a_copy(tmp_path):
    writer, base = SegmentWriter(tmp_path, RECORD), {"rows": [1]}
    writer.append(np.zeros((2, 2), np.float32), base)
    base["rows"].append(2)
    assert writer.flush()[0]["base"] == {"rows": [1]}
    writer.close()


@pytest.mark.parametrize("name", ["write", "open", "fsync"])
def test_a_full_disk_breaks_the_writer_and_never_raises_into_training(tmp_path, monkeypatch, name):
    writer = SegmentWriter(tmp_path, RECORD, 2 * RECORD)
    append(writer, 0, 1)
    assert contents(tmp_path, writer.flush()) == [0, 1]
    num_fds = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, name, failing(errno.ENOSPC))
        append(writer, 2, 3, 4, 5)
        with pytest.raises(CheckpointError, match=r"No space left.*restart\(\)"):
            writer.flush()
    append(writer, 6)
    assert "No space left" in writer.broken
    writer.restart()
    assert writer.broken is None and writer.flush() == []
    append(writer, 7, 8, 9)
    assert contents(tmp_path, writer.flush()) == [7, 8, 9]
    assert len(os.listdir("/proc/self/fd")) == num_fds
    assert writer.delete_unlisted(set()) >= 1 and len(list(tmp_path.iterdir())) == 2
    writer.close()


@pytest.mark.parametrize("pattern", ["replay", "replay/*"])
def test_removed_segments_are_noticed_at_the_flush(tmp_path, pattern):
    writer = SegmentWriter(tmp_path / "replay", RECORD)
    append(writer, 1)
    for path in tmp_path.glob(pattern):
        path.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="No such file"):
        writer.flush()
    writer.restart()
    append(writer, 2)
    assert contents(tmp_path / "replay", writer.flush()) == [2]
    writer.close()
