"""Where tensors lie when actors, store and learner are on a GPU, shown without one: see
pretend_gpu.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch in which Python can make a device",
)
ROOT = Path(__file__).parents[1]
NOISY = ("--model.noisy", "True", "--algorithm.n-step", "3", "--algorithm.double", "True")


def on_both(launch: str, *options: str) -> dict:
    command = [sys.executable, ROOT / "tests/pretend_gpu.py", ROOT / f"launch/{launch}.py"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert not result.returncode, result.stderr[-3000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("launch", "options", "copies_in", "waits"),
    [
        # A replay on the device: an update sends a few integers for the draw, one time more for
        # priorities, and waits for nothing; an LSTM asks once a pass where episodes open.
        ("tiny_breakout_dqn", (), 1, 0),
        ("cartpole_dqn", (*NOISY, "--algorithm.replay.priority-exponent", "0.5"), 2, 0),
        ("masked_cartpole_dqn", (), 2, 4),
        # Rollouts cross once, a leaf at a time, and the order of each of PPO's epochs.
        ("tiny_breakout_ppo", (), 8 + 4, 0),
        ("cartpole_a2c", (), 8, 0),
        ("breakout_impala", (), 9, 0),
    ],
)
def test_all_is_on_the_device_and_gives_what_the_cpu_gives(launch, options, copies_in, waits):
    found = on_both(launch, *options)
    assert found["on device"]
    assert found["difference"] < 1e-6  # the largest net's last layer is computed otherwise
    assert not found["acting"]["actions differ"] and found["acting"]["log_prob"] < 1e-6
    assert found["acting"]["unrolls"] >= 2 and len(found["updates"]) == 3
    for update in found["updates"]:
        assert (update["in"], update["waits"], update.get("out", 0)) == (copies_in, waits, 0)
        if "dqn" in launch:
            assert update["bytes in"] < 100  # nothing that is learned from
    assert found["publication"]["waits"] == found["dtypes"] == 1


def test_what_is_mixed_is_refused():
    code = (
        "import torch, pretend_gpu; kept = pretend_gpu.install()\n"
        "there = torch.ones(3).to(pretend_gpu.NAME)\n"
        "try: there + torch.ones(3)\n"
        "except RuntimeError as error: print(error)\n"
        "print((there + torch.tensor(1.0)).sum().item(), pretend_gpu.moved['waits'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True
    )
    assert "expected all on one device, got (3,) on the CPU" in told.stdout, told.stderr
    assert told.stdout.split()[-2:] == ["6.0", "1"]
