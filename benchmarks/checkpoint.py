"""How long training pauses for a checkpoint, with a replay of 1,000,000 Breakout frames.

    TMPDIR=/on/the/disk python benchmarks/checkpoint.py

The learner of launch/breakout_dqn.py is made as in a run and its replay filled with noise, about 7
GB, whose unrolls stream to the disk as they come in. Then unrolls come in at a steady rate, an
update is made now and then, and a checkpoint after every `--seconds`: weights, optimizer, counters
and the whole replay. Compared are that pause and a plain write of as many bytes as the streamed
unrolls take on the disk: about 9 GB, as each also carries the stack of frames it begins with. In
the end a second learner resumes from the last checkpoint. 20 GB of TMPDIR are needed, which must
not lie in memory.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
from full_replay import FullReplay
from measure import Report, arguments, like_a_run, median


def main() -> None:
    parser = arguments(__doc__, repeats=9)
    parser.add_argument("--launch", default="launch/breakout_dqn.py", help="with a replay")
    parser.add_argument("--rate", type=float, default=1000, help="env steps a second")
    parser.add_argument("--seconds", type=float, default=20, help="between two checkpoints")
    options = parser.parse_args()
    like_a_run()
    report, pauses = Report("checkpoint", options), []
    with tempfile.TemporaryDirectory() as folder:
        full = FullReplay(Path(folder), options.launch, save_replay=True)
        learner = full.learner
        learner.start(resume=False)
        full.fill()
        learner.save()
        for _ in range(options.repeats):
            begun = time.monotonic()
            before = learner.env_steps
            while (passed := time.monotonic() - begun) < options.seconds:
                if learner.env_steps - before < options.rate * passed:
                    full.insert()
                else:
                    learner.algorithm.update(learner.store)
            begun = time.monotonic()
            learner.save()
            pauses.append(time.monotonic() - begun)
        store = learner.store
        frames, taken = store.limiter.inserted, learner.updates
        what = f"a replay of {store.capacity:,} frames"
        nbytes = sum(file.stat().st_size for file in Path(folder).rglob("segment_*"))
        learner.stream.writer.close()
        begun = time.monotonic()
        write_plainly(Path(folder) / "plain.bin", nbytes)
        plain = time.monotonic() - begun
        del full, learner, store
        again = FullReplay(Path(folder), options.launch, save_replay=True).learner
        begun = time.monotonic()
        resumed = again.start(resume=True)
        seconds = time.monotonic() - begun
        if not resumed or (again.store.limiter.inserted, again.updates) != (frames, taken):
            raise RuntimeError("the second learner did not resume what the first one had saved")
    report.table([
        {what: "pause of training for a checkpoint of all", "s": pauses},
        {what: f"plain write of its streamed unrolls, {nbytes / 1e9:.1f} GB", "s": plain},
        {what: "resume: weights and the whole replay", "s": seconds},
    ])  # fmt: skip
    report.goal("median pause", median(pauses), at_most=1, unit=" s")
    report.finish()


def write_plainly(path: Path, nbytes: int) -> None:
    """As many bytes, synced, in one go: what a checkpoint that is not incremental would cost."""
    block = np.random.default_rng(0).bytes(1 << 24)
    with open(path, "wb") as file:
        while nbytes > 0:
            nbytes -= file.write(block[:nbytes])
        os.fsync(file.fileno())
    path.unlink()


if __name__ == "__main__":
    main()
