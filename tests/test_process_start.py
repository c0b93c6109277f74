"""How the processes of a run find each other: torchrun on a machine without an accelerator, time limits,
and starts that cannot work.
"""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image

from pixlat.common import processes
from pixlat.common.errors import UserError
from pixlat.common.images import synthetic
from pixlat.common.processes import COLLECTIVE_TIMEOUT_MIN, join_processes
from pixlat.evaluation.records.record import read_record

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> str:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return str(any_port.getsockname()[1])


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """Two processes as a user starts them, without a word about CPUs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")} | {
        "OMP_NUM_THREADS": "1"
    }
    call = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        free_port(),
        *command,
    ]
    return subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


LIMITS = """
import json
import torch
from torch.distributed.distributed_c10d import _get_default_group
from pixlat.common.config.schema import TrainConfig
from pixlat.common.training.setup import make_accelerator
accelerator = make_accelerator(TrainConfig())
seconds = _get_default_group()._get_backend(torch.device("cpu")).options._timeout.total_seconds()
if accelerator.is_main_process:
    print(json.dumps([accelerator.num_processes, accelerator.device.type, seconds]))
"""


def test_collectives_wait_for_hours(tmp_path):
    """NCCL's own limit is ten minutes, gloo's thirty: less than the main process's pictures
    or a large checkpoint may take.
    """
    script = tmp_path / "limits.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{LIMITS}")
    result = torchrun(str(script))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [2, "cpu", 60 * COLLECTIVE_TIMEOUT_MIN]
    assert COLLECTIVE_TIMEOUT_MIN >= 180


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A small run by torchrun on images of 16 px, and what it printed."""
    root = tmp_path_factory.mktemp("torchrun")
    for number in range(40):
        folder = root / "images" / synthetic.CLASS_NAMES[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.draw(number, 16).transpose(1, 2, 0)).save(folder / f"{number}.png")
    settings = {
        "method": "jit", "data": "folder", "data.path": root / "images", "data.image_size": 16, "out": root / "runs",
        "name": "run", "model.depth": 2,
        "model.width": 16, "model.heads": 2, "model.patch": 4, "model.bottleneck": 8,
        "model.context_tokens": 2, "model.context_start": 1,
        "train.images": 32, "train.batch": 16, "train.micro_batch": 4, "train.preview_images": 0,
        "eval.num_images": 20, "sample.steps": 2,
        "cluster.collective_timeout_min": 2,
    }  # fmt: skip
    result = torchrun("launch/run.py", *(f"{key}={value}" for key, value in settings.items()))
    assert result.returncode == 0, result.stderr
    return root / "runs/run", result.stdout


def test_torchrun_trains_on_a_machine_without_an_accelerator(finished):
    """accelerate connects processes on CPUs only if it is told so: each took itself for the only one,
    and one was refused the other's folder.
    """
    folder, printed = finished
    assert read_record(folder / "result.json")["metrics"]["fd"]["value"] > 0
    assert printed.count(f"{folder}/result.json") == 1, "one process speaks for the run"


@pytest.mark.parametrize(
    "command",
    [("run.py",), ("sweep.py", "sample.steps=2,3", "tries=20", "num_images=20", "seeds=[0]")],
    ids=["run", "sweep"],
)
def test_torchrun_evaluates_on_a_machine_without_an_accelerator(finished, command):
    folder = finished[0]
    before = set(folder.glob("evaluations/*/result.json"))
    result = torchrun(f"evaluation/{command[0]}", f"run={folder}", *command[1:])
    assert result.returncode == 0, result.stderr
    (made,) = set(folder.glob("evaluations/*/result.json")) - before
    assert result.stdout.count(str(made)) == 1, "one process speaks for all"
    if command[0] == "run.py":
        first, again = (read_record(file)["metrics"]["fd"] for file in (folder / "result.json", made))
        assert again["value"] == pytest.approx(first["value"], rel=1e-6)


def test_a_process_whose_peers_never_come_says_so(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"the 2 processes of this start did not all connect to 127\.0\.0\.1:\d+ within 0\.01"
    ):
        processes._meet(timedelta(minutes=0.01))


def test_several_processes_that_were_not_started_as_such_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match=r"WORLD_SIZE=2 .* RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"
    ):
        join_processes()


def test_processes_that_accelerate_does_not_connect_are_refused(monkeypatch):
    """As one process of a run that is already at work would be: accelerate keeps the state of its first call."""
    assert join_processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "_meet", lambda patience: {})
    with pytest.raises(UserError, match=r"started 2 processes \(WORLD_SIZE\), but accelerate sees 1"):
        join_processes()
