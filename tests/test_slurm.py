"""Real jobs on a real, if small, Slurm cluster: two nodes on this machine (tests/local_slurm.py).

Where Slurm is not installed the tests are skipped; with CI in the environment that is a failure.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from local_slurm import PACKAGES, Cluster, wait_for
from PIL import Image
from safetensors.torch import load_file

from pixlat.common.config.resolve import resolve
from pixlat.common.errors import UserError
from pixlat.common.files import read_rows
from pixlat.common.images import synthetic
from pixlat.common.weights.checkpoint import latest
from pixlat.evaluation.records.record import read_record
from pixlat.launch.cluster.snapshot import FOLDERS
from pixlat.launch.cluster.submit import submit_all
from pixlat.launch.job.folder import is_finished
from pixlat.launch.job.stages import stage_runs
from pixlat.launch.run import configurations
from pixlat.methods import get_spec, registered

ROOT = Path(__file__).resolve().parent.parent
MODEL = (
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.patch=8",
    "model.bottleneck=8",
    "model.context_tokens=2",
    "model.context_start=1",
)
TRAIN = (
    "train.images=6400",
    "train.batch=16",
    "train.log_images=176",
    "train.checkpoint_images=1600",
    "train.preview_images=0",
)
SMALL = (*MODEL, *TRAIN, "sample.steps=2", "eval.num_images=0", "eval.grid_columns=1")
SLURM = (
    "cluster=slurm",
    "cluster.partition=main",
    "cluster.timeout_min=20",
    "cluster.gpus_per_node=0",
    "cluster.mem_gb=1",
)
TWO_NODES = ("cluster.nodes=2",)
SECONDS = 600  # for whatever a loaded machine takes


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """Two nodes of four CPUs with two pretend GPUs each."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin"):
        reason = f"Slurm is not installed: apt-get install -y --no-install-recommends {PACKAGES}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not below pytest's, whose path is too long for sockets
    cluster = Cluster(folder)
    try:
        cluster.start(nodes=2, cpus=4, gpus=2)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Where the runs are: each test has names of its own."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    """10 classes of 8 images of 32 px, two of each in val/."""
    root = tmp_path_factory.mktemp("images")
    for number in range(80):
        folder = root / ("val" if number % 40 < 10 else "train") / synthetic.CLASS_NAMES[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.draw(number, 32).transpose(1, 2, 0)).save(folder / f"{number}.png")
    return ("data=folder", f"data.path={root}", "data.image_size=32")


@pytest.fixture
def settle(out, data) -> Callable[..., list[str]]:
    """The arguments of the command, the later ones winning."""

    def merged(*arguments: str) -> list[str]:
        settings = dict(argument.split("=", 1) for argument in (f"out={out}", *data, *arguments))
        return [f"{key}={value}" for key, value in settings.items()]

    return merged


@pytest.fixture
def submit(slurm, out, settle, monkeypatch, capsys) -> Callable[..., list[str]]:
    """Submits from this process, which has imported torch already; returns the jobs."""

    def run(*arguments: str) -> list[str]:
        assert submit_all(configurations(settle(*arguments))) == 0
        return jobs_of(capsys.readouterr().out)

    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(out)
    return run


def jobs_of(printed: str) -> list[str]:
    """The jobs that the command told of."""
    return [words[1].rstrip(",") for words in map(str.split, printed.splitlines()) if words[:1] == ["job"]]


def command(slurm: Cluster, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it."""
    call = [sys.executable, str(ROOT / "launch/run.py"), *arguments]
    return subprocess.run(call, env=slurm.environment, capture_output=True, text=True, timeout=SECONDS)


def statuses(slurm: Cluster, out: Path) -> dict[str, dict[str, str]]:
    """What `launch/status.py` says, by run."""
    command = [sys.executable, str(ROOT / "launch/status.py"), str(out), "--json"]
    printed = subprocess.run(
        command, env=slurm.environment, capture_output=True, text=True, timeout=SECONDS, check=True
    ).stdout
    return {row["name"]: row for row in map(json.loads, printed.splitlines())}


def finish(slurm: Cluster, folder: Path) -> None:
    """Waits for the record and the pictures, which come after it; a run that fails shows its log."""

    def over() -> bool:
        return is_finished(folder) or (folder / "failure.json").exists()

    assert wait_for(over, SECONDS, 0.5) and is_finished(folder), "\n".join(
        map(str, [statuses(slurm, folder.parent), log_of(folder)])
    )


def log_of(folder: Path) -> str:
    """The logs of all processes of the last job."""
    log = Path(read_rows(folder / "jobs.jsonl")[-1]["log"])
    return "\n".join(file.read_text() for file in sorted(log.parent.glob("*_log.out")))


def field(slurm: Cluster, job: str, name: str) -> str:
    """One of the facts that the controller has of a job."""
    words = slurm.client("scontrol", "--oneliner", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)[name]


def training(folder: Path) -> bool:
    return len(read_rows(folder / "metrics.jsonl")) > 0


def outcome(folder: Path) -> dict:
    """What interruptions must not change: weights, losses, pictures."""
    weights = {file.name: load_file(file) for file in sorted(latest(folder / "checkpoints").glob("*.safetensors"))}
    rows = [
        {key: value for key, value in row.items() if key not in ("images_per_s", "seconds")}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    return {"weights": weights, "metrics": rows, "picture": np.asarray(Image.open(folder / "samples.png")).tobytes()}


def assert_same(one: dict, two: dict) -> None:
    for name, tensors in one["weights"].items():
        for key, value in tensors.items():
            assert torch.equal(value, two["weights"][name][key]), (name, key)
    assert one["metrics"] == two["metrics"] and one["picture"] == two["picture"]


def test_a_preempted_run_on_two_nodes_equals_an_undisturbed_one_of_two_local_processes(slurm, out, settle):
    """A job of a higher partition takes the nodes: all processes agree, save, are queued again,
    and go on from the same step.
    """
    told = command(slurm, settle("method=jit", *SMALL, *SLURM, *TWO_NODES, "cluster.exclusive=true", "name=preempted"))
    assert told.returncode == 0, told.stderr
    (job,), folder = jobs_of(told.stdout), out / "preempted"
    assert wait_for(lambda: training(folder), SECONDS)
    slurm.client("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert wait_for(lambda: field(slurm, job, "Restarts") == "1", 60)
    local = command(slurm, settle("method=jit", *SMALL, "cluster=local", "cluster.tasks_per_node=2", "name=local"))
    assert local.returncode == 0 and "finished" in local.stdout, local.stderr
    finish(slurm, folder)
    assert_same(outcome(out / "local"), outcome(folder))
    log = log_of(folder)
    assert (
        len(read_rows(folder / "starts.jsonl")) == 2 and "Traceback" not in log and "stopped by SIGUSR2; saved" in log
    )
    saved = int(log.split("saved ")[1].split("step-")[1][:8])
    assert 0 < saved < 400 and saved % 100, "it saved at the signal, not at an interval"
    results = [pickle.loads(file.read_bytes())[0] for file in (out / ".jobs" / job).glob("*_result.pkl")]
    assert results == ["success"] * 2, "a process of the first start left an error behind"


def test_a_sweep_is_one_array_with_a_limit_and_survives_the_death_of_a_node(slurm, out, submit):
    """Nothing is signalled: Slurm misses the node, queues its job again, and the run goes on from the newest whole
    checkpoint on the other node.
    """
    first, second = submit("method=jit", *SMALL, *SLURM, "cluster.array_parallelism=2", "seed=0,1")
    assert first.endswith("_0") and second.endswith("_1") and first[:-2] == second[:-2]
    assert field(slurm, second, "ArrayTaskThrottle") == "2"
    folders = [
        next(file.parent for file in out.glob("*/jobs.jsonl") if read_rows(file)[-1]["job"] == job)
        for job in (first, second)
    ]
    for folder in folders:
        finish(slurm, folder)
    (job,) = submit("method=jit", *SMALL, *SLURM, "seed=1", "name=orphan")
    orphan = out / "orphan"
    assert wait_for(lambda: latest(orphan / "checkpoints") is not None, SECONDS)
    node = field(slurm, job, "NodeList")
    slurm.kill_node(node)
    assert wait_for(lambda: field(slurm, job, "Restarts") == "1", 60)
    finish(slurm, orphan)
    assert_same(outcome(folders[1]), outcome(orphan))
    assert len(read_rows(orphan / "starts.jsonl")) == 2 and field(slurm, job, "NodeList") != node
    assert statuses(slurm, out)["orphan"]["state"] == "finished"
    slurm.start_node(node)
    slurm.wait_idle([node], 30)


def test_a_run_goes_on_after_its_time_limit_and_not_after_it_is_cancelled(slurm, out, submit):
    """Slurm itself signals before the limit; then the limit is raised, and the run cancelled.

    It may signal up to a minute too early, and on a busy machine the processes need half a minute until they listen:
    hence a limit of three minutes.
    """
    endless = (
        "method=jit",
        *SMALL,
        *SLURM,
        *TWO_NODES,
        "train.images=16000000",
        "name=cancelled",
        "cluster.timeout_min=3",
        "cluster.signal_delay_s=60",
    )
    (job,) = submit(*endless)
    folder = out / "cancelled"
    assert wait_for(lambda: training(folder), SECONDS)
    assert not submit(*endless), "it works already"
    assert wait_for(lambda: field(slurm, job, "Restarts") == "1", 240)
    slurm.client("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    saved = int(log_of(folder).split("stopped by SIGUSR2; saved ")[1].split("step-")[1][:8])
    assert wait_for(lambda: [row for row in read_rows(folder / "metrics.jsonl") if row["step"] > saved + 11], SECONDS)
    steps = [row["step"] for row in read_rows(folder / "metrics.jsonl")]
    assert steps == list(range(11, steps[-1] + 1, 11)) and len(read_rows(folder / "starts.jsonl")) == 2, (
        "no step is lost, none is taken twice"
    )
    slurm.client("scancel", job)
    assert wait_for(lambda: not slurm.client("squeue", "--noheader", "--jobs", job).strip(), 60)
    row = statuses(slurm, out)["cancelled"]
    assert (
        row["state"] == "stopped"
        and field(slurm, job, "JobState") == "CANCELLED"
        and field(slurm, job, "Restarts") == "1"
    )
    assert latest(folder / "checkpoints") is not None and "stopped by SIGTERM; saved" in log_of(folder)


def test_gpus_are_requested_and_a_machine_that_cannot_use_them_is_named(slurm, out, submit):
    gpus = ("cluster=slurm", "cluster.partition=main", "cluster.timeout_min=20")
    with pytest.raises(UserError, match="Requested node configuration is not available"):
        submit("method=jit", *SMALL, *gpus, "cluster.gpus_per_node=4", "name=many")
    (job,) = submit("method=jit", *SMALL, *gpus, "cluster.gpus_per_node=2", "name=gpus")
    assert wait_for(lambda: field(slurm, job, "JobState") == "FAILED", SECONDS, 0.5)
    row = statuses(slurm, out)["gpus"]
    assert (
        row["state"] == "failed"
        and "was to give 2 GPUs (given: 0,1)" in row["reason"]
        and "cluster.exclude=127.0.0.1" in row["reason"]
    )
    log = Path(row["reason"].rpartition("Log: ")[2])  # of the process that failed first
    assert log.parent == Path(row["log"]).parent and "error: 127.0.0.1" in log.read_text()
    assert "gpu" in field(slurm, job, "TresPerNode")


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the code in which every method has a preset `tiny`: its demo for two steps."""
    root = tmp_path / "checkout"
    for package in (*FOLDERS, "pixlat"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in registered():
        spec = get_spec(name)
        model = {"stat_images": 16} if hasattr(spec.config, "stat_images") else {}
        train = {"images": 32, "batch": 16, "warmup_images": 0, "preview_images": 0}
        preset = {"extends": "demo", "model": model, "train": train, "eval": {"num_images": 0, "grid_columns": 1}}
        with (root / Path(spec.presets).relative_to(ROOT)).open("a") as file:
            file.write(f"\ntiny: {json.dumps(preset)}\n")
    return root


def test_every_method_trains_on_two_nodes_and_its_earlier_stages_before_it(slurm, out, settle, checkout):
    """One sweep from one command: an array for what can start at once, and jobs that depend on it."""
    methods = sorted(registered())
    arguments = settle(*SLURM, *TWO_NODES, f"method={','.join(methods)}", "preset=tiny", "cluster.array_parallelism=2")
    environment = slurm.environment | {"PYTHONPATH": str(checkout)}
    told = subprocess.run(
        [sys.executable, str(checkout / "launch/run.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    folders = {name: next(out.glob(f"{name}-folder-tiny-seed0-*")) for name in methods}
    jobs = {name: read_rows(folder / "jobs.jsonl")[-1]["job"] for name, folder in folders.items()}
    stages = {
        name: [
            run.method
            for run in stage_runs(resolve(get_spec(name), {"data.name": "folder", "data.image_size": "32"})).values()
        ]
        for name in methods
    }
    assert any(stages.values()) and set(jobs_of(told.stdout)) == set(jobs.values())
    rows = statuses(slurm, out)
    for name, earlier in stages.items():
        for stage in earlier:
            assert field(slurm, jobs[name], "Dependency").startswith(f"afterok:{jobs[stage]}"), (
                "submitted before the earlier stage has ended"
            )
            assert (rows[folders[name].name]["state"], rows[folders[name].name]["reason"]) == ("waiting", "Dependency")
    for name, folder in folders.items():
        finish(slurm, folder)
        record = read_record(folder / "result.json")
        assert record["train"]["images_seen"] == 32 and "Traceback" not in log_of(folder)
        built_on = {parent["method"]: parent["checkpoint_sha256"] for parent in record["parents"]}
        for stage in stages[name]:
            assert built_on[stage] == read_record(folders[stage] / "result.json")["checkpoint"]["sha256"]
