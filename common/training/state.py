"""The state of a training: everything that a checkpoint holds. Saves it, restores it, gives the weights to sample."""

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
from pixlat.common.training.resume import OpenCheckpoint, last_good_checkpoint
from pixlat.common.training.sharding import all_finite, gathered, placed_like, with_weights
from pixlat.common.weights import checkpoint
from pixlat.common.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from pixlat.common.method import Method


def state_without_external(method: Method) -> dict[str, Tensor]:
    """The method's state dict without its external networks, which are loaded from other files."""
    outside = tuple(f"{name}." for name in method.external)
    return {key: value for key, value in method.state_dict().items() if not key.startswith(outside)}


def load_state_without_external(method: Method, state: Mapping[str, Tensor]) -> None:
    """Loads what `state_without_external` returned. torch raises an error for a missing, extra or misshapen key."""
    outside = tuple(f"{name}." for name in method.external)
    method.load_state_dict(
        {**state, **{key: value for key, value in method.state_dict().items() if key.startswith(outside)}}
    )


@dataclass
class TrainState:
    """Everything that a checkpoint holds. `train` returns it as the result of the training."""

    method: Method  # on the device, with the raw weights
    optimizers: dict[str, list[Optimizer]]
    emas: list[Ema]
    settings: TrainConfig
    folder: Path
    identity: str
    accelerator: Accelerator
    meters: Meters
    micro_batch: int  # images per process and backward pass; random draws depend on it, so a resumed run keeps it
    # under FSDP2 a copy of `method` on the meta device; sampling fills it with the gathered weights
    meta_method: Method | None = None
    step: int = 0
    start: int = 0  # the step of the checkpoint that this start resumed from
    seconds: float = 0.0  # time in the loop, summed over all starts, without interludes and checkpoints
    saved: Path | None = None
    warned_of_start: bool = False  # the warning that an average still holds mostly initial weights was printed

    @contextlib.contextmanager
    def weights(self, ema: str) -> Iterator[Method]:
        """The method in evaluation mode, with the weights of the named average ("raw": the trained weights).

        All processes must call this together. It does not switch on the training's autocast:
        the caller chooses the precision of sampling (common/precision.py).
        """
        average = next((e for e in self.emas if e.name == ema), None)
        was_training = self.method.training
        self.method.eval()
        try:
            with self._gathered_method(average) if self.meta_method else self._local_method(average) as method:
                yield method.eval()
        finally:
            self.method.train(was_training)

    @contextlib.contextmanager
    def preview_weights(self, ema: str) -> Iterator[Method]:
        """Like `weights`, but gives the raw weights while the average still holds more than START_SHARE of the
        initial weights, because such an average draws grey pictures. Prints this once.
        """
        average = next((e for e in self.emas if e.name == ema), None)
        share = average.start_share(self.step, self.settings.batch) if average else 0.0
        if share > START_SHARE and self.accelerator.is_main_process and not self.warned_of_start:
            print_beside_bar(
                f"after {self.step * self.settings.batch} images the average {ema} still consists of initial weights "
                f"to {share:.0%}. Until that is {START_SHARE:.0%}, previews show the raw weights, and the scores in "
                "curve.jsonl, which are measured with the average, are too bad"
            )
            self.warned_of_start = True
        with self.weights("raw" if share > START_SHARE else ema) as method:
            yield method

    @contextlib.contextmanager
    def _local_method(self, average: Ema | None) -> Iterator[Method]:
        with average.applied(dict(self.method.named_parameters())) if average else contextlib.nullcontext():
            yield self.method

    @contextlib.contextmanager
    def _gathered_method(self, average: Ema | None) -> Iterator[Method]:
        assert self.meta_method is not None
        state = state_without_external(self.method) | (average.average if average else {})
        with with_weights(self.meta_method, {name: gathered(value) for name, value in state.items()}) as method:
            yield method

    def check_finite(self) -> dict[str, float]:
        """Returns the means since the last line of the log; raises UserError if one is infinite or NaN.

        `save` calls it first, so no checkpoint is written after such a loss.
        """
        means = self.meters.means()
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise self._spoilt(
                f"{', '.join(bad)} became non-finite within the last {max(self.meters.counts.values())} "
                f"micro-batches before step {self.step}."
            )
        return means

    def check_weights(self) -> None:
        """Raises UserError if a weight or an average is infinite or NaN. Costs one host sync.

        `check_finite` cannot see this: the loss that produced an infinite gradient can itself be finite.
        """
        averages = [value for ema in self.emas for value in ema.average.values()]
        tensors = [*state_without_external(self.method).values(), *averages]
        if not all_finite(tensors, self.accelerator):
            raise self._spoilt(
                f"the weights became non-finite at or before step {self.step}, though the losses were not."
            )

    def _spoilt(self, what: str) -> UserError:
        """The error for a training that became non-finite. All processes must call this together."""
        last = last_good_checkpoint(self.folder, self.accelerator)
        return UserError(f"{what} {last} Try a lower train.lr, train.clip_grad=1, or train.precision=fp32.")

    def save(self) -> None:
        """Writes a checkpoint from the main process. Its content does not depend on the number of processes."""
        self.check_finite()
        self.check_weights()
        folder = self.folder / "checkpoints"
        main = self.accelerator.is_main_process
        meters = self.meters.of_all_processes()
        if main or self.meta_method:
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
        """The tensors of each checkpoint file by the file's stem; under FSDP2 this process's parts of them."""
        names = {p: name for name, p in self.method.named_parameters()}
        tensors = {"model": state_without_external(self.method)}
        tensors |= {f"ema-{ema.name}": ema.average for ema in self.emas}
        return tensors | {stem: optimizer_state(optimizer, names) for stem, optimizer in self._optimizer_stems()}

    def _collected(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Under FSDP2, gathers the tensors one by one and moves them to the CPU of each process with `keep`.

        Without FSDP2, returns them as they are.
        """
        if self.meta_method is None:
            return dict(tensors)
        pairs = ((name, gathered(value)) for name, value in tensors.items())
        return {name: value.cpu() for name, value in pairs if keep}

    def restore(self, opened: OpenCheckpoint) -> None:
        """Restores everything but the method's weights, which the caller has loaded already."""
        names = {p: name for name, p in self.method.named_parameters()}
        for stem, optimizer in self._optimizer_stems():
            load_optimizer_state(optimizer, opened.tensors(stem), names)
        for ema in self.emas:
            ema.average = {
                name: placed_like(value, ema.average[name]) for name, value in opened.tensors(f"ema-{ema.name}")
            }
        place = (self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device)
        self.meters = Meters.of_process(dict(opened.tensors("meters")), opened.facts["meter_counts"], *place)
        self.step, self.seconds, self.saved = opened.facts["step"], opened.facts["seconds"], opened.path
        self.start = self.step

    def _optimizer_stems(self) -> Iterator[tuple[str, Optimizer]]:
        for phase, optimizers in self.optimizers.items():
            for number, optimizer in enumerate(optimizers):
                yield f"optimizer-{phase}-{number}", optimizer
