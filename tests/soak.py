"""A run under fire: `python tests/soak.py`.

One run is killed again and again, and must end as the undisturbed one: same weights, losses, pictures, record.

Each start is hit once, by SIGKILL, SIGTERM or SIGUSR2, at a random moment of a random part: while the process starts,
trains (and is scored while it trains), writes a checkpoint, draws samples, or evaluates. Seven minutes on one core
with the defaults; `key=value` arguments change the run, which is the demo cut short, `--kills` and `--seed` the fire.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from pixlat.common.files import read_rows
from pixlat.common.weights.checkpoint import latest

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (
    "train.images=4800",
    "train.warmup_images=800",
    "train.log_images=160",
    "train.checkpoint_images=800",
    "train.preview_images=0",
)
RUN = ("method=jit", *TRAIN, "eval.num_images=100", "eval.every_images=1600", "eval.grid_columns=4")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)
# of the record: what no clock can change
UNTIMED = ("metrics", "params", "compute", "sampling", "protocol_hash", "system", "data", "seeds")
PATIENCE_S = 1800


def start(out: Path, name: str, settings: list[str]) -> subprocess.Popen[bytes]:
    """The command, in the background."""
    command = [sys.executable, str(ROOT / "launch/run.py"), f"out={out}", f"name={name}", *settings]
    with (out / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=out)


def moments(folder: Path) -> dict[str, Callable[[], bool]]:
    """When each part of a run has begun, as seen from outside;
    compared with what was there when the process started.
    """
    lines = len(read_rows(folder / "metrics.jsonl"))
    starts = len(read_rows(folder / "starts.jsonl"))
    return {
        "start": lambda: True,
        "training": lambda: len(read_rows(folder / "metrics.jsonl")) > lines,
        "checkpoint": lambda: any((folder / "checkpoints").glob(".writing-*")),
        "drawing": lambda: len(read_rows(folder / "starts.jsonl")) > starts and trained(folder),
        "evaluation": lambda: len(read_rows(folder / "starts.jsonl")) > starts and (folder / "neighbours.png").exists(),
    }


def trained(folder: Path) -> bool:
    """Whether the last checkpoint is there."""
    rows = read_rows(folder / "metrics.jsonl")
    total = next(
        float(line.split(":")[1])
        for line in (folder / "config.yaml").read_text().splitlines()
        if line.startswith("  images:")
    )
    return bool(rows) and rows[-1]["images"] >= total and not any((folder / "checkpoints").glob(".writing-*"))


def hit(child: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> str:
    """Waits for a part of the run to begin and kills within it; says what happened."""
    parts = moments(folder)
    over = (
        ["drawing", "evaluation", "evaluation"]
        if folder.exists() and trained(folder)
        else ["training", "training", "checkpoint"]
    )
    part = rng.choice(["start", *over])
    number = rng.choice(SIGNALS)
    deadline = time.monotonic() + PATIENCE_S
    while not parts[part]():
        if parts["evaluation"]():  # a checkpoint is written in a moment, which may be missed; the last part may not
            part = "evaluation"
            break
        if child.poll() is not None:
            return f"over before {part}"
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run never came to {part}")
        time.sleep(0.002 if part == "checkpoint" else 0.05)
    time.sleep(rng.uniform(0.0, 3.0) if part != "checkpoint" else rng.uniform(0.0, 0.02))
    child.send_signal(number)
    child.wait(timeout=PATIENCE_S)
    return f"{number.name} in {part}"


def outcome(folder: Path) -> dict[str, object]:
    """What interruptions must not change."""
    newest = latest(folder / "checkpoints")
    assert newest is not None
    record = json.loads((folder / "result.json").read_text())
    return {
        **{
            f"{file.name}/{key}": value
            for file in sorted(newest.glob("*.safetensors"))
            for key, value in load_file(file).items()
        },
        "rows": [
            {key: value for key, value in row.items() if key not in ("images_per_s", "seconds")}
            for row in read_rows(folder / "metrics.jsonl")
        ],
        "curve": read_rows(folder / "curve.jsonl"),
        **{name: np.asarray(Image.open(folder / name)).tobytes() for name in ("samples.png", "neighbours.png")},
        **{key: record[key] for key in UNTIMED},
        "trained": [record["train"][key] for key in ("images_seen", "macs_total", "batch", "optimizer")],
    }


def differences(one: dict[str, object], two: dict[str, object]) -> list[str]:
    """The names of what differs."""

    def same(a: object, b: object) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b

    return sorted(key for key in one.keys() | two.keys() if not same(one.get(key), two.get(key)))


def main() -> int:
    """Returns 0 if the disturbed run ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="key=value of the run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    given = dict(setting.split("=", 1) for setting in (*RUN, *options.settings))
    settings = [f"{key}={value}" for key, value in given.items()]
    rng, out = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="soak-"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"in {out}; the undisturbed run first", flush=True)
    if start(out, "undisturbed", settings).wait(timeout=PATIENCE_S):
        print((out / "undisturbed.log").read_text()[-2000:])
        return 1
    kills = 0
    while kills < options.kills:
        told = hit(start(out, "disturbed", settings), out / "disturbed", rng)
        if told.startswith("over"):
            break
        kills += 1
        print(f"{kills:3} {told}", flush=True)
    code = start(out, "disturbed", settings).wait(timeout=PATIENCE_S)
    if code:
        print((out / "disturbed.log").read_text()[-2000:])
        return 1
    wrong = differences(outcome(out / "undisturbed"), outcome(out / "disturbed"))
    print(
        f"after {kills} kills: "
        f"{'the same weights, losses, pictures and record' if not wrong else 'other ' + ', '.join(wrong[:8])}; "
        f"{out} may be removed"
    )
    return int(bool(wrong) or kills < options.kills)


if __name__ == "__main__":
    sys.exit(main())
