"""The one command from end to end, as a user runs it: in its own process, on a folder of small images."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluated_run import image_folder
from PIL import Image
from safetensors.torch import load_file

from pixlat.common.datasets.summary import DataSummary
from pixlat.common.errors import UserError
from pixlat.common.images import synthetic
from pixlat.common.training.meters import read_rows
from pixlat.common.weights.checkpoint import latest
from pixlat.evaluation.records.curve import read_curve
from pixlat.evaluation.records.record import read_record
from pixlat.launch.job.folder import read_data, record_data

ROOT = Path(__file__).resolve().parent.parent
MODEL = (
    "model.depth=2",
    "model.width=16",
    "model.heads=2",
    "model.patch=4",
    "model.bottleneck=8",
    "model.context_tokens=2",
    "model.context_start=1",
)
TRAIN = (
    "train.images=320",
    "train.batch=16",
    "train.warmup_images=0",
    "train.log_images=32",
    "train.checkpoint_images=48",
    "train.preview_images=160",
)
EVAL = ("eval.num_images=24", "eval.every_images=160", "eval.batch=10", "eval.grid_columns=3", "sample.steps=3")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """10 classes of 8 images of 16 px, two of each in val/."""
    root = tmp_path_factory.mktemp("images")
    for number in range(80):
        part = "val" if number % 40 < 10 else "train"
        folder = root / part / synthetic.CLASS_NAMES[number % 10]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.draw(number, 16).transpose(1, 2, 0)).save(folder / f"{number}.png")
    return root


def command(images: Path, out: Path, *changes: str) -> list[str]:
    arguments = (
        "method=jit",
        "data=folder",
        f"data.path={images}",
        "data.image_size=16",
        f"out={out}",
        "name=run",
        *MODEL,
        *TRAIN,
        *EVAL,
    )
    settings = dict(argument.split("=", 1) for argument in (*arguments, *changes))
    return [sys.executable, str(ROOT / "launch/run.py"), *(f"{key}={value}" for key, value in settings.items())]


def start(arguments: list[str], **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options
    )


def outcome(folder: Path) -> dict:
    """What must not depend on interruptions: weights, losses, scores, pictures."""
    checkpoint = latest(folder / "checkpoints")
    metrics = [
        {k: v for k, v in row.items() if k not in ("images_per_s", "seconds")}
        for row in read_rows(folder / "metrics.jsonl")
    ]
    pictures = {name: np.asarray(Image.open(folder / name)) for name in ("samples.png", "neighbours.png")}
    return {
        "weights": {file.name: load_file(file) for file in sorted(checkpoint.glob("*.safetensors"))},
        "metrics": metrics,
        "curve": read_rows(folder / "curve.jsonl"),
        "scores": read_record(folder / "result.json")["metrics"],
        "pictures": {name: pixels.tobytes() for name, pixels in pictures.items()},
    }


def assert_same(a: dict, b: dict) -> None:
    for name, tensors in a["weights"].items():
        for key, value in tensors.items():
            assert torch.equal(value, b["weights"][name][key]), (name, key)
    for part in ("metrics", "curve", "scores", "pictures"):
        assert a[part] == b[part], part


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    result = start(command(images, out))
    assert result.returncode == 0, result.stderr
    (out / "seconds").write_text(str(time.monotonic() - began))
    (out / "stdout").write_text(result.stdout)
    return out / "run"


def test_the_run_folder_is_complete_and_named_at_the_end(finished):
    printed = (finished.parent / "stdout").read_text()
    for name in ("samples.png", "neighbours.png", "training.png", "metrics.jsonl", "result.json"):
        assert (finished / name).stat().st_size > 0
        assert str(finished / name) in printed
    assert [point["images"] for point in read_curve(finished / "curve.jsonl")] == [160]
    for name in ("config.yaml", "starts.jsonl", "previews/images-000000160.png", "previews/images-000000320.png"):
        assert (finished / name).exists(), name
    assert json.loads((finished / "data.json").read_text())["class_names"] == sorted(synthetic.CLASS_NAMES)
    first = json.loads((finished / "starts.jsonl").read_text().splitlines()[0])
    assert (
        "launch/run.py" in first["command"]
        and first["packages"]["torch"] == torch.__version__.split("+")[0]
        and first["code"]["git_sha"]
    )
    assert "fd_ratio" in printed and "run" in printed


def test_the_record_tells_score_cost_and_origin(finished):
    record = read_record(finished / "result.json")
    assert (
        record["train"]["images_seen"] == 320
        and record["train"]["macs_total"] > 0
        and record["memory"]["peak_bytes_train"] > 0
    )
    assert record["sampling"]["nfe_evals"] == 5 and record["speed"]["images_per_s"] > 0
    assert record["compute"]["macs_per_image"] == pytest.approx(
        record["compute"]["macs_per_forward"] * record["sampling"]["net_forwards"], rel=1e-9
    )
    assert record["params"]["gen_total"] > record["params"]["gen_trainable"] > 0
    wanted = {"fd_ratio", "fd", "kid", "memorisation", "is", "precision", "recall", "density", "coverage"}
    assert wanted <= record["metrics"].keys() and record["real"]["metrics"]["fd_ratio"]["value"] == 1
    assert record["checkpoint"]["step"] == 20 and record["artifacts"]["grid_png"] == "samples.png"


def test_a_second_start_says_finished_and_touches_nothing(images, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = start(command(images, finished.parent))
    assert result.returncode == 0 and "is finished" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_start_that_was_stopped_while_drawing_draws_and_scores_nothing_again(images, finished, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(run)], check=True)
    (run / "neighbours.png").unlink()
    record = (run / "result.json").read_bytes()
    drawn = start(command(images, tmp_path))
    assert drawn.returncode == 0 and "is finished" not in drawn.stdout, drawn.stderr
    assert (run / "result.json").read_bytes() == record
    assert_same(outcome(finished), outcome(run))
    shutil.rmtree(run / "checkpoints")  # nothing to draw from: training again for the sake of a picture would be absurd
    (run / "neighbours.png").unlink()
    assert "is finished" in start(command(images, tmp_path)).stdout and not (run / "checkpoints").exists()


def test_other_settings_in_the_same_folder_are_refused(images, finished):
    result = start(command(images, finished.parent, "train.lr=0.5"))
    assert result.returncode == 2 and "train.lr: " in result.stderr and "another name=" in result.stderr


def test_data_that_changed_since_the_first_start_are_refused(tmp_path):
    summary = DataSummary("photos", 2, 16, 100, 5, ("cat", "dog"), "0" * 64)
    record_data(tmp_path, summary)
    record_data(tmp_path, summary)
    with pytest.raises(UserError, match=r"the data have changed since .*\(num_train: 100 -> 99\)"):
        record_data(tmp_path, replace(summary, num_train=99))
    assert read_data(tmp_path)["num_train"] == 100


def killed(arguments: list[str], number: signal.Signals, after: float) -> bool:
    """Starts a run and sends it a signal after so many seconds, unless it is over by then."""
    child = subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        child.communicate(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        child.send_signal(number)
        child.communicate()
        return True


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_moment_change_nothing(images, finished, tmp_path, seed):
    """Killed again and again, at random times, in training, scores, checkpoint writing, drawing or evaluation;
    tests/soak.py does it to the demo.
    """
    rng = random.Random(seed)
    seconds = float((finished.parent / "seconds").read_text())
    kills = 0
    while kills == 0:  # a machine that is less busy now than when the run was measured may finish before the first kill
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2, signal.SIGKILL, signal.SIGTERM)
        kills = sum(killed(command(images, tmp_path), number, rng.uniform(0.3, 0.8) * seconds) for number in signals)
        seconds /= 2
    assert start(command(images, tmp_path)).returncode == 0
    assert_same(outcome(finished), outcome(tmp_path / "run"))


def test_sigterm_saves_and_exits_with_its_number(images, finished, tmp_path):
    child = subprocess.Popen(
        command(images, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.terminate()
    errors = child.communicate(timeout=120)[1]
    if child.returncode != 0:  # the run may have been over before the signal came
        assert child.returncode == 128 + signal.SIGTERM and "SIGTERM" in errors and "checkpoints/step-" in errors
    assert start(command(images, tmp_path)).returncode == 0
    assert_same(outcome(finished), outcome(tmp_path / "run"))


def test_a_second_process_is_kept_out(images, finished, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text((finished / "config.yaml").read_text())
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = start(command(images, tmp_path))
    assert result.returncode == 2 and "another process is working in" in result.stderr


def test_two_processes_make_the_same_images_and_scores(images, finished, tmp_path):
    """Training sums in another order, so both start from the checkpoint of one process."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(run)], check=True)
    (run / "result.json").unlink()
    (run / "samples.png").unlink()
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20001 + os.getpid() % 20000)}
    children = [
        subprocess.Popen(
            command(images, tmp_path),
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert read_record(run / "result.json")["speed"]["devices"] == 2
    one, two = outcome(finished), outcome(run)
    assert one["pictures"] == two["pictures"]
    for name, entry in one["scores"].items():
        assert two["scores"][name]["value"] == pytest.approx(entry["value"], rel=1e-9), name


def test_slow_pictures_do_not_hold_up_other_processes(tmp_path):
    """They last until the other process has left, and processes wait for each other for 20 s at most."""
    data = image_folder(tmp_path / "data")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20002 + os.getpid() % 20000)}
    script = [sys.executable, str(ROOT / "tests/slow_pictures.py"), str(tmp_path), str(data)]
    children = [
        subprocess.Popen(
            script,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [child.communicate(timeout=300)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0], printed
    record = read_record(tmp_path / "run/result.json")
    assert record["metrics"]["fd"]["value"] > 0
    for name in ("grid_png", "neighbours_png", "curve_png"):
        assert (tmp_path / "run" / record["artifacts"][name]).exists()


@pytest.mark.parametrize("batch", [1, 24])
def test_scores_do_not_depend_on_the_sampling_batch(images, finished, tmp_path, batch):
    """Matrix products of another shape round differently, which may turn a pixel by one level."""
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(run)], check=True)
    (run / "result.json").unlink()
    result = start(command(images, tmp_path, f"eval.batch={batch}"))
    assert result.returncode == 0, result.stderr
    for name, entry in outcome(finished)["scores"].items():
        assert outcome(run)["scores"][name]["value"] == pytest.approx(entry["value"], rel=1e-3), name


def test_a_corrupt_image_is_named(images, tmp_path):
    subprocess.run(["cp", "-r", str(images), str(tmp_path / "images")], check=True)
    victim = next((tmp_path / "images/train").rglob("*.png"))
    victim.write_bytes(victim.read_bytes()[:60])
    for workers in (0, 1):
        result = start(command(tmp_path / "images", tmp_path, f"data.workers={workers}", f"name=w{workers}"))
        assert result.returncode == 2 and str(victim.name) in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / f"w{workers}").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.path=/nowhere"], "/nowhere"),
        (["data.num_classes=7"], "data.num_classes=7"),
        (["model.patch=5"], "model.patch=5"),
        (["train.batch=15", "train.micro_batch=4"], "train.micro_batch=4"),
        (["out=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_mistakes_fail_before_a_folder_is_made(images, tmp_path, changes, message):
    result = start(command(images, tmp_path, *changes))
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_sweep_goes_on_after_a_run_that_fails(images, tmp_path):
    arguments = command(images, tmp_path, "train.images=16", "eval.num_images=0", "model.patch=5,4")
    result = start([argument for argument in arguments if not argument.startswith("name=")])
    assert result.returncode == 2 and "model.patch=5" in result.stderr
    assert len(list(tmp_path.glob("*/result.json"))) == 1


def test_dry_run_writes_nothing_and_tells_the_cost(images, tmp_path):
    result = start(command(images, tmp_path, "dry_run=true"))
    assert result.returncode == 0 and not list(tmp_path.iterdir())
    for fact in ("parameters", "GMACs an image", "steps        20 of 16 images", str(tmp_path / "run"), "memory"):
        assert fact in result.stdout
