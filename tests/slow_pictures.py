"""One of two processes of a run whose pictures last until the other process
has left: `python tests/slow_pictures.py FOLDER DATA`.
"""

import os
import sys
import time
from pathlib import Path

import torch
from evaluated_run import MODEL, Projections

from pixlat.common.config.resolve import resolve
from pixlat.launch.job import execute, pictures
from pixlat.methods import get_spec

# that a process waits for another; far above what the tiny run needs, far below what a slow picture may take
LIMIT_S = 20.0
KEYS = {
    "data.name": "folder", "data.image_size": "8", "data.flip": "true", "train.images": "32",
    "train.batch": "16", "train.micro_batch": "8",
    "train.preview_images": "0", "train.warmup_images": "0", "train.ema_decay": "[0.9]",
    "eval.num_images": "24", "eval.batch": "7",
    "eval.grid_columns": "2", "sample.steps": "2", "cluster.collective_timeout_min": str(LIMIT_S / 60),
}  # fmt: skip


def main(folder: Path, data: Path) -> None:
    """The run, and a file that says that this process is through with it."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    draw = pictures.save_png

    def slow(*arguments: object) -> None:
        deadline = time.monotonic() + 2 * LIMIT_S
        while not (folder / "left-1").exists():
            if time.monotonic() > deadline:
                raise AssertionError("the other process waits for the pictures")
            time.sleep(0.05)
        draw(*arguments)

    pictures.save_png = slow
    sys.modules["pixlat.evaluation.judges.panel"].EmbeddedExtractor = Projections
    settings = {
        **KEYS,
        "data.path": str(data),
        "out": str(folder),
        "name": "run",
        **{f"model.{key}": str(value) for key, value in MODEL.items()},
    }
    execute.run_one(resolve(get_spec("jit"), settings))
    (folder / f"left-{rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
