"""Memory without a name, bells that are not missed, children that do not outlive their parent."""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

from asyncrl.transport.shared_memory import Doorbell, Segment


def test_a_segment_is_zeroed_really_there_and_has_no_name():
    segment = Segment.create("some-name", 3_000_001)
    assert segment.nbytes == len(segment.buffer) == 3_000_001
    assert segment.buffer[:] == bytes(3_000_001)
    assert os.fstat(segment.fd).st_blocks * 512 >= 3_000_001
    assert os.readlink(f"/proc/self/fd/{segment.fd}") == "/memfd:asyncrl-some-name (deleted)"
    assert not [name for name in os.listdir("/dev/shm") if "some-name" in name]
    again = Segment.attach(segment.fd)
    again.buffer[3_000_000] = 5
    assert segment.buffer[3_000_000] == 5


def test_a_segment_and_a_bell_reach_a_child_by_file_descriptor_only():
    segment, bell = Segment.create("child", 10_000), Doorbell.create()
    segment.buffer[:2] = b"\7\0"
    code = (
        "import sys; from asyncrl.transport.shared_memory import Doorbell, Segment\n"
        "segment = Segment.attach(int(sys.argv[1])); segment.buffer[1] = segment.buffer[0] + 1\n"
        "assert segment.nbytes == 10_000; Doorbell(int(sys.argv[2])).ring()"
    )
    command = [sys.executable, "-c", code, str(segment.fd), str(bell.fd)]
    assert not bell.wait(0)
    subprocess.run(command, check=True, pass_fds=(segment.fd, bell.fd), timeout=20)
    assert segment.buffer[:2] == b"\7\10" and bell.wait(0)
    assert not os.get_inheritable(segment.fd) and not os.get_inheritable(bell.fd)


def test_too_large_a_segment_is_an_error_and_leaves_nothing_open():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = os.listdir("/proc/self/fd")
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(OSError):
            Segment.create("large", 1_000_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir("/proc/self/fd") == before


def test_a_ring_before_the_wait_is_not_lost_and_many_rings_wake_once():
    bell = Doorbell.create()
    for _ in range(3):
        bell.ring()
    begun = time.monotonic()
    assert bell.wait(10)
    assert time.monotonic() - begun < 1
    assert not bell.wait(0)


def test_a_wait_ends_at_its_deadline_or_at_the_ring():
    bell = Doorbell.create()
    begun = time.monotonic()
    assert not bell.wait(0.1)
    assert 0.1 <= time.monotonic() - begun < 1
    threading.Timer(0.1, bell.ring).start()
    begun = time.monotonic()
    assert bell.wait(10)
    assert 0.05 <= time.monotonic() - begun < 2


def test_wait_for_looks_at_the_condition_and_beats_every_period():
    bell, beats = Doorbell.create(), []
    assert bell.wait_for(lambda: True, lambda: beats.append(1), 10) and not beats

    begun = time.monotonic()  # gives up when on_idle says so
    assert not bell.wait_for(lambda: False, lambda: beats.append(1) or len(beats) == 4, 0.05)
    assert len(beats) == 4 and 0.15 <= time.monotonic() - begun < 1

    arrived = []

    def arrive() -> None:
        bell.ring()  # for nothing
        time.sleep(0.05)
        arrived.append(1)
        bell.ring()

    thread = threading.Thread(target=arrive)
    begun = time.monotonic()
    thread.start()
    assert bell.wait_for(lambda: bool(arrived), lambda: False, 10)
    assert time.monotonic() - begun < 2
    thread.join()


def test_a_grandchild_dies_with_its_parent():
    """The pipe's other end is open in parent and grandchild only, so its end is the end of both."""
    read, write = os.pipe()
    code = (
        "import os, signal, sys; from asyncrl.transport.shared_memory import die_with_parent\n"
        "parent = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    die_with_parent(parent)\n"
        "    os.write(int(sys.argv[1]), str(os.getpid()).encode())\n"
        "signal.pause()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(write)], pass_fds=(write,))
    os.close(write)
    assert select.select([read], [], [], 20)[0]
    grandchild = int(os.read(read, 20))
    assert not select.select([read], [], [], 0.1)[0]
    parent.kill()
    parent.wait()
    ended = select.select([read], [], [], 2)[0]
    if not ended:
        os.kill(grandchild, signal.SIGKILL)
    assert ended and os.read(read, 20) == b""
    os.close(read)


def test_a_child_whose_parent_is_dead_already_dies_at_once():
    code = (
        "import os; from asyncrl.transport.shared_memory import die_with_parent\n"
        "die_with_parent(os.getpid())"  # not its parent's
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=20).returncode == -signal.SIGKILL
