"""The state of a training: all that a checkpoint holds, how it is saved and restored,
and the weights to sample with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import Optimizer

from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.progress import print_beside_bar
from pixlat.common.training.ema import START_SHARE, Ema
from pixlat.common.training.meters import Meters
from pixlat.common.training.optim import load_optimizer_state, optimizer_state
from pixlat.common.training.resume import Found, last_good_checkpoint
from pixlat.common.training.sharding import all_finite, gathered, placed_like, with_weights
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pixlat.common.method import Method


def state_without_external(method: Method) -> dict[str, Tensor]:
    """The method's state without its external networks, which come from files of their own."""
    outside = tuple(f"{name}." for name in method.external)
    return {key: value for key, value in method.state_dict().items() if not key.startswith(outside)}


def load_state_without_external(method: Method, state: Mapping[str, Tensor]) -> None:
    """The inverse of `state_without_external`; a missing, extra or misshapen key is an error."""
    outside = tuple(f"{name}." for name in method.external)
    method.load_state_dict(
        {**state, **{key: value for key, value in method.state_dict().items() if key.startswith(outside)}}
    )


@dataclass
class TrainState:
    """Everything that a checkpoint holds, and the result of the training."""

    method: Method  # on the device, with the raw weights
    optimizers: dict[str, list[Optimizer]]
    emas: list[Ema]
    settings: TrainConfig
    folder: Path
    identity: str
    accelerator: Accelerator
    meters: Meters
    micro_batch: int  # images a process takes at once: draws depend on it, so a resumed run keeps it
    blank: Method | None = None  # where `method` is spread over the processes: its copy without memory, to sample with
    step: int = 0
    start: int = 0  # the step that this start took up
    seconds: float = 0.0  # in the loop, over all resumed parts; interludes and checkpoints not counted
    saved: Path | None = None
    told_of_start: bool = False  # that an average is mostly its beginning

    @contextlib.contextmanager
    def weights(self, ema: str) -> Iterator[Method]:
        """The method in evaluation mode, with the named average in place ("raw": as trained).

        All processes ask together.

        Not under the training's autocast: who samples says in what precision (common/precision.py).
        """
        average = next((e for e in self.emas if e.name == ema), None)
        was_training = self.method.training
        self.method.eval()
        try:
            with self._whole_method(average) if self.blank else self._own_method(average) as method:
                yield method.eval()
        finally:
            self.method.train(was_training)

    @contextlib.contextmanager
    def preview_weights(self, ema: str) -> Iterator[Method]:
        """As `weights`, but raw ones while the average is mostly its beginning,
        which would show as grey pictures; says so once.
        """
        average = next((e for e in self.emas if e.name == ema), None)
        share = average.start_share(self.step, self.settings.batch) if average else 0.0
        if share > START_SHARE and self.accelerator.is_main_process and not self.told_of_start:
            print_beside_bar(
                f"after {self.step * self.settings.batch} images the average {ema} is still {share:.0%} initial "
                f"weights: previews show the raw weights until it is {START_SHARE:.0%}, and scores of curve.jsonl, "
                "which are the average's, are too bad until then"
            )
            self.told_of_start = True
        with self.weights("raw" if share > START_SHARE else ema) as method:
            yield method

    @contextlib.contextmanager
    def _own_method(self, average: Ema | None) -> Iterator[Method]:
        with average.applied(dict(self.method.named_parameters())) if average else contextlib.nullcontext():
            yield self.method

    @contextlib.contextmanager
    def _whole_method(self, average: Ema | None) -> Iterator[Method]:
        assert self.blank is not None
        state = state_without_external(self.method) | (average.average if average else {})
        with with_weights(self.blank, {name: gathered(value) for name, value in state.items()}) as method:
            yield method

    def check_finite(self) -> dict[str, float]:
        """The means of the running window; a non-finite one is a UserError.

        Called before anything is saved, so no checkpoint is ever poisoned.
        """
        means = self.meters.means()
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise self._spoilt(
                f"{', '.join(bad)} became non-finite within the last {max(self.meters.counts.values())} "
                f"micro-batches before step {self.step}."
            )
        return means

    def check_weights(self) -> None:
        """Weights or averages that are not finite are a UserError: the loss before an infinite gradient looks fine.

        One host sync.
        """
        averages = [value for ema in self.emas for value in ema.average.values()]
        tensors = [*state_without_external(self.method).values(), *averages]
        if not all_finite(tensors, self.accelerator):
            raise self._spoilt(
                f"the weights became non-finite at or before step {self.step}, though the losses were not."
            )

    def _spoilt(self, what: str) -> UserError:
        """All processes must ask."""
        last = last_good_checkpoint(self.folder, self.accelerator)
        return UserError(f"{what} {last} Try a lower train.lr, train.clip_grad=1, or train.precision=fp32.")

    def save(self) -> None:
        """Writes a checkpoint from the main process; it does not tell how many processes there were."""
        self.check_finite()
        self.check_weights()
        folder = self.folder / "checkpoints"
        main = self.accelerator.is_main_process
        meters = self.meters.of_all_processes()
        if main or self.blank:
            tensors = {stem: self._collected(part, main) for stem, part in self._tensors().items()} | {"meters": meters}
        if main:
            facts = {
                "identity": self.identity,
                "step": self.step,
                "images_seen": self.step * self.settings.batch,
                "seconds": self.seconds,
                "micro_batch": self.micro_batch,
                "meter_counts": self.meters.counts,
                "torch": torch.__version__,
            }
            checkpoint.save(folder, self.step, Checkpoint(tensors, facts), self.settings.keep_checkpoints)
        self.saved = checkpoint.path_of(folder, self.step)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file stem, as this process has them."""
        names = {p: name for name, p in self.method.named_parameters()}
        tensors = {"model": state_without_external(self.method)}
        tensors |= {f"ema-{ema.name}": ema.average for ema in self.emas}
        return tensors | {stem: optimizer_state(optimizer, names) for stem, optimizer in self._optimizer_stems()}

    def _collected(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors for the process that keeps them; spread ones are gathered one by one and go to the CPU,
        the others stay what they are.
        """
        if self.blank is None:
            return dict(tensors)
        pairs = ((name, gathered(value)) for name, value in tensors.items())
        return {name: value.cpu() for name, value in pairs if keep}

    def restore(self, found: Found) -> None:
        """Takes up a checkpoint whose weights the method has already."""
        names = {p: name for name, p in self.method.named_parameters()}
        for stem, optimizer in self._optimizer_stems():
            load_optimizer_state(optimizer, found.tensors(stem), names)
        for ema in self.emas:
            ema.average = {
                name: placed_like(value, ema.average[name]) for name, value in found.tensors(f"ema-{ema.name}")
            }
        place = (self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device)
        self.meters = Meters.of_process(dict(found.tensors("meters")), found.facts["meter_counts"], *place)
        self.step, self.seconds, self.saved = found.facts["step"], found.facts["seconds"], found.path
        self.start = self.step

    def _optimizer_stems(self) -> Iterator[tuple[str, Optimizer]]:
        for phase, optimizers in self.optimizers.items():
            for number, optimizer in enumerate(optimizers):
                yield f"optimizer-{phase}-{number}", optimizer
