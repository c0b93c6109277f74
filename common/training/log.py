"""Reports a training's progress: metrics.jsonl, trackers, the progress bar, and the time spent in training."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pixlat.common.files import append_row
from pixlat.common.progress import print_beside_bar, progress_bar
from pixlat.common.training.ema import shortened_averages
from pixlat.common.training.meters import truncate_rows
from pixlat.common.training.optim import learning_rate
from pixlat.common.training.state import TrainState
from pixlat.common.training.steps import due


def wandb_run(folder: Path, identity: str) -> dict[str, str]:
    """Arguments of `wandb.init` that make all starts of a run, also requeued ones, continue one W&B run.

    Its id depends on the run's folder and configuration only.
    """
    key = hashlib.sha256(f"{identity} {folder.resolve()}".encode()).hexdigest()[:16]
    return {"name": folder.name, "id": f"{identity}-{key}", "resume": "allow"}


class TrainingLog:
    """Writes metrics.jsonl and the trackers, updates the progress bar, and measures the training time."""

    def __init__(self, state: TrainState, steps: int) -> None:
        self.state = state
        self.steps = steps
        self.main = state.accelerator.is_main_process
        self.file = state.folder / "metrics.jsonl"
        self.alarmed: set[str] = set()
        if self.main:
            truncate_rows(self.file, state.step)
            for sentence in [] if state.step else shortened_averages(state.settings):
                print(sentence, file=sys.stderr)
        if state.settings.trackers:
            state.accelerator.init_trackers("pixlat", init_kwargs={"wandb": wandb_run(state.folder, state.identity)})
        self.last = (time.perf_counter(), state.step)

    @contextlib.contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Shows images done, images/s, time left and the loss on stderr."""
        batch = self.state.settings.batch
        self.bar = progress_bar("train", self.steps * batch, self.state.step * batch, enabled=self.main, keep=True)
        self.last = (time.perf_counter(), self.state.step)
        with self.bar:
            yield
        # accelerate's end_training() would also destroy the process group, which the evaluation needs
        for tracker in self.state.accelerator.trackers:
            tracker.finish()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the block does not count as training time."""
        start = time.perf_counter()
        yield
        self.last = (self.last[0] + time.perf_counter() - start, self.last[1])

    def after_step(self) -> None:
        """Advances the bar. Every `train.log_images` images, also writes a line and clears the meters."""
        state = self.state
        self.bar.update(state.settings.batch)
        if not due(state.settings.log_images, state.settings, state.step):
            return
        means = state.check_finite()
        now = time.perf_counter()
        seconds, images = now - self.last[0], (state.step - self.last[1]) * state.settings.batch
        state.seconds += seconds
        self.last = (now, state.step)
        state.meters.clear()
        if self.main:
            lr = learning_rate(state.settings, (state.step - 1) * state.settings.batch)
            row = {"step": state.step, "images": state.step * state.settings.batch, **means, "lr": lr}
            append_row(self.file, row | {"images_per_s": images / seconds, "seconds": state.seconds})
            for name, alarm in state.method.alarms(means).items():
                if name not in self.alarmed:
                    print_beside_bar(f"warning after {row['images']} images: {alarm}")
                    self.alarmed.add(name)
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in means.items() if name.endswith("loss")})
        if state.settings.trackers:
            state.accelerator.log(means, step=state.step)
