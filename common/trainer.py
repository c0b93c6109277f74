"""The training loop: one for all methods. It knows phases, optimizers, averages and checkpoints; it knows no method, loss or network."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import Optimizer

from common import checkpoint
from common.checkpoint import Checkpoint
from common.compiled import compile_blocks
from common.config import TrainConfig
from common.ema import START_SHARE, Ema, build_emas, shortened_averages
from common.encoders.frozen import compile_frozen
from common.errors import UserError
from common.files import append_row
from common.memory import recompute_blocks
from common.meters import Meters, truncate_rows
from common.optim import build_optimizers, learning_rate, set_learning_rate
from common.precision import resolve_precision, set_float32_products
from common.processes import COLLECTIVE_TIMEOUT_MIN, join_processes
from common.progress import print_beside_bar, progress_bar
from common.resume import Found, last_good_checkpoint, newest_checkpoint
from common.seeds import seed_step
from common.sharding import all_finite, communicating, filled, hollow, placed_like, shard, whole, whole_parameters
from common.signals import StopRequest

if TYPE_CHECKING:
    from methods.base import Batch, Method

# (first step, micro-batches of this process a step) -> for each step its micro-batches: uint8 "image", "label", "index"
MakeBatches = Callable[[int, int], Iterator[list[dict[str, Tensor]]]]

# (every so many images, what is done then). It is also done at a start that takes up a checkpoint of such a moment, since the last start may have been
# stopped in it: `state.start == state.step` tells. All processes call it, and it cannot disturb the training.
Interlude = tuple[int, Callable[["TrainState"], None]]


class Stopped(Exception):
    """A signal asked the run to stop, and everything is saved."""

    def __init__(self, signal_name: str, saved: Path) -> None:
        super().__init__(f"stopped by {signal_name}; saved {saved}. Run the same command again to go on.")
        self.signal_number = int(signal.Signals[signal_name])


def make_accelerator(settings: TrainConfig, folder: Path | None = None, timeout_min: float = COLLECTIVE_TIMEOUT_MIN) -> Accelerator:
    """Processes, device, precision of products (common/precision.py) and trackers; parameters and optimizer state stay fp32.

    A process has one at a time: a later run of a sweep may have another precision, and an earlier accelerator then has it too.
    timeout_min: minutes that a process waits for the others in a collective.
    """
    for package in settings.trackers:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"train.trackers=[{package}] needs the package {package}: pip install 'pixlat[trackers]'.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    precision = resolve_precision(settings.precision, join_processes(timeout_min=timeout_min).device)
    set_float32_products(precision)
    AcceleratorState._reset_state()  # keeps the processes' connection
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", log_with=list(settings.trackers) or None, project_dir=folder)


def replicate(method: Method, accelerator: Accelerator) -> nn.Module:
    """The method with gradients averaged over the processes, each of which holds all of it; the method itself where there is one process."""
    several = len(method.phases) > 1  # each leaves the others' networks alone
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=several, gradient_as_bucket_view=True)
    return accelerator.prepare_model(method)


def split_batch(settings: TrainConfig, processes: int, began_with: int | None = None) -> tuple[int, int]:
    """(images a process takes at once, how often it does so each step), from the global batch.

    began_with: the micro-batch of the run's earlier steps, which it keeps on any number of processes: each micro-batch has random numbers of its own.
    """
    micro_batch = settings.micro_batch or began_with or settings.batch // processes
    if micro_batch and settings.batch % (micro_batch * processes) == 0:
        return micro_batch, settings.batch // (micro_batch * processes)
    if began_with and not settings.micro_batch:
        raise UserError(
            f"this run has been training with micro-batches of {began_with} images, which {processes} processes cannot share out evenly in a batch of "
            f"{settings.batch}. Its random draws depend on them, so they stay: go on with a number of processes that divides {settings.batch // began_with}. "
            "Where memory is short, cluster.sharding=fsdp2 and train.recompute_blocks=true change no result; another micro-batch is a new run."
        )
    raise UserError(
        f"train.batch={settings.batch} is not a multiple of train.micro_batch={micro_batch} times {processes} processes. "
        "Choose a micro-batch that divides the global batch evenly."
    )


def total_steps(settings: TrainConfig) -> int:
    """Optimizer steps until `train.images` images have been shown; the last step may go beyond by part of a batch."""
    return math.ceil(settings.images / settings.batch)


def due(every_images: int, settings: TrainConfig, step: int) -> bool:
    """Whether the step that has just ended was the one that passed a multiple of `every_images`, or was the last."""
    return step == total_steps(settings) or step * settings.batch // every_images > (step - 1) * settings.batch // every_images


def due_interludes(interludes: Sequence[Interlude], state: TrainState) -> list[Callable[[TrainState], None]]:
    """What is to be done at this step of the training."""
    return [call for every, call in interludes if every and state.step and due(every, state.settings, state.step)]


def prepare_batch(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """Moves a micro-batch to the device and its images from uint8 to float in [-1, 1]."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {name: value.float().div_(127.5).sub_(1.0) if value.dtype == torch.uint8 else value for name, value in moved.items()}


def everyones(batches: Iterator[Batch], processes: int) -> Generator[Batch, None, None]:
    """The micro-batches of all processes, in the order in which one process would see them: statistics must not depend on the number of processes."""
    for batch in batches:
        if processes == 1:
            yield batch
            continue
        gathered = {name: [torch.empty_like(value) for _ in range(processes)] for name, value in batch.items()}
        for name, value in batch.items():
            dist.all_gather(gathered[name], value.contiguous())
        yield from ({name: values[rank] for name, values in gathered.items()} for rank in range(processes))


def look_at_the_data(method: Method, make_batches: MakeBatches, micro_batches_a_step: int, accelerator: Accelerator) -> None:
    """`before_training` with the training's own batches from step 0 on, in the training's precision, so that both see the same features."""
    with batches_of_all_processes(make_batches, 0, micro_batches_a_step, accelerator) as batches, accelerator.autocast():
        method.before_training(batches)


@contextlib.contextmanager
def batches_of_all_processes(make_batches: MakeBatches, start_step: int, micro_batches_a_step: int, accelerator: Accelerator) -> Iterator[Iterator[Batch]]:
    """The training's micro-batches from a step on, those of all processes in each. Loader processes start when the first is asked for, and end here."""

    def own() -> Iterator[Batch]:
        for batches in make_batches(start_step, micro_batches_a_step):
            yield from (prepare_batch(batch, accelerator.device) for batch in batches)

    with contextlib.closing(everyones(own(), accelerator.num_processes)) as batches:
        yield batches


def measure_at_the_end(state: TrainState, make_batches: MakeBatches, micro_batches_a_step: int, average: str) -> None:
    """Puts what the method measures after its training (`after_training`) into its buffers, for the last checkpoint."""
    if not implements(state.method, "after_training"):
        return
    batches_of_all = batches_of_all_processes(make_batches, state.step, micro_batches_a_step, state.accelerator)
    with batches_of_all as batches, state.weights(average) as method:
        measured = method.after_training(batches)
    for name, value in measured.items():
        state.method.get_buffer(name).copy_(value)


def prepare_blocks(method: Method, settings: TrainConfig) -> None:
    """Compiles and recomputes blocks as the settings ask. Copies of the method are made before: a changed block stays bound to this one.

    With compiled blocks its frozen networks are compiled as well, and cuDNN times its convolutions to choose the fastest, whose rounding a restart
    may not find again; without, it chooses by rule.
    """
    torch.backends.cudnn.benchmark = settings.compile
    if settings.compile:
        compile_blocks(method, settings.recompute_blocks)
        compile_frozen(method)
    elif settings.recompute_blocks:
        recompute_blocks(method)


def implements(method: Method, name: str) -> bool:
    """Whether the method has a function of its own for what the base class leaves empty."""
    return sum(name in vars(each) for each in type(method).__mro__) > 1


def own_state(method: Method) -> dict[str, Tensor]:
    """The method's state without its external networks, which come from files of their own."""
    outside = tuple(f"{name}." for name in method.external)
    return {key: value for key, value in method.state_dict().items() if not key.startswith(outside)}


def load_own_state(method: Method, state: Mapping[str, Tensor]) -> None:
    """The inverse of `own_state`; a missing, extra or misshapen key is an error."""
    outside = tuple(f"{name}." for name in method.external)
    method.load_state_dict({**state, **{key: value for key, value in method.state_dict().items() if key.startswith(outside)}})


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
    blank: Method | None = None  # where `method` is spread over the processes: its hollow copy, to sample with
    step: int = 0
    start: int = 0  # the step that this start took up
    seconds: float = 0.0  # in the loop, over all resumed parts; interludes and checkpoints not counted
    saved: Path | None = None
    told_of_start: bool = False  # that an average is mostly its beginning

    @contextlib.contextmanager
    def weights(self, ema: str) -> Iterator[Method]:
        """The method in evaluation mode, with the named average in place ("raw": as trained). All processes ask together.

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
        """As `weights`, but raw ones while the average is mostly its beginning, which would show as grey pictures; says so once."""
        average = next((e for e in self.emas if e.name == ema), None)
        share = average.start_share(self.step, self.settings.batch) if average else 0.0
        if share > START_SHARE and self.accelerator.is_main_process and not self.told_of_start:
            print_beside_bar(
                f"after {self.step * self.settings.batch} images the average {ema} is still {share:.0%} initial weights: previews show the raw weights until "
                f"it is {START_SHARE:.0%}, and scores of curve.jsonl, which are the average's, are too bad until then"
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
        state = own_state(self.method) | (average.average if average else {})
        with filled(self.blank, {name: whole(value) for name, value in state.items()}) as method:
            yield method

    def check_finite(self) -> dict[str, float]:
        """The means of the running window; a non-finite one is a UserError. Called before anything is saved, so no checkpoint is ever poisoned."""
        means = self.meters.means()
        if bad := [name for name, value in means.items() if not math.isfinite(value)]:
            raise self._spoilt(f"{', '.join(bad)} became non-finite within the last {max(self.meters.counts.values())} micro-batches before step {self.step}.")
        return means

    def check_weights(self) -> None:
        """Weights or averages that are not finite are a UserError: the loss before an infinite gradient looks fine. One host sync."""
        tensors = list(own_state(self.method).values()) + [value for ema in self.emas for value in ema.average.values()]
        if not all_finite(tensors, self.accelerator):
            raise self._spoilt(f"the weights became non-finite at or before step {self.step}, though the losses were not.")

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
        tensors = {"model": own_state(self.method)}
        tensors |= {f"ema-{ema.name}": ema.average for ema in self.emas}
        return tensors | {stem: checkpoint.optimizer_state(optimizer, names) for stem, optimizer in self._optimizer_stems()}

    def _collected(self, tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """Whole tensors for the process that keeps them; spread ones are gathered one by one and go to the CPU, the others stay what they are."""
        if self.blank is None:
            return dict(tensors)
        gathered = ((name, whole(value)) for name, value in tensors.items())
        return {name: value.cpu() for name, value in gathered if keep}

    def restore(self, found: Found) -> None:
        """Takes up a checkpoint whose weights the method has already."""
        names = {p: name for name, p in self.method.named_parameters()}
        for stem, optimizer in self._optimizer_stems():
            checkpoint.load_optimizer_state(optimizer, found.tensors(stem), names)
        for ema in self.emas:
            ema.average = {name: placed_like(value, ema.average[name]) for name, value in found.tensors(f"ema-{ema.name}")}
        place = (self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.device)
        self.meters = Meters.of_process(dict(found.tensors("meters")), found.facts["meter_counts"], *place)
        self.step, self.seconds, self.saved = found.facts["step"], found.facts["seconds"], found.path
        self.start = self.step

    def _optimizer_stems(self) -> Iterator[tuple[str, Optimizer]]:
        for phase, optimizers in self.optimizers.items():
            for number, optimizer in enumerate(optimizers):
                yield f"optimizer-{phase}-{number}", optimizer


def train(
    method: Method,
    settings: TrainConfig,
    make_batches: MakeBatches,
    folder: Path,
    seed: int,
    identity: str,
    accelerator: Accelerator,
    interludes: Sequence[Interlude] = (),
    sharding: str = "ddp",
    evaluated: str = "raw",
) -> TrainState:
    """Trains to `settings.images`, or goes on from the newest whole checkpoint under `folder`.

    sharding: how several processes share the work, "ddp" or "fsdp2" (common/sharding.py).
    evaluated: the average that the run is sampled with, or "raw"; the method measures with it what it hands on to other runs.
    Raises UserError for a non-finite loss or an unwritable folder (the last good checkpoint stays and is named), Stopped after SIGTERM, SIGUSR2 or Ctrl-C.
    """
    steps = total_steps(settings)
    method.to(accelerator.device).train()
    resumed = newest_checkpoint(folder, identity, accelerator)
    unfinished = resumed and resumed.facts["step"] < steps  # else nothing more is drawn, and any number of processes may evaluate
    micro_batch, micro_batches_a_step = split_batch(settings, accelerator.num_processes, resumed.facts.get("micro_batch") if resumed and unfinished else None)
    method.check_micro_batch(micro_batch)
    if resumed:
        load_own_state(method, dict(resumed.tensors("model")))
    else:
        look_at_the_data(method, make_batches, micro_batches_a_step, accelerator)
    spread = sharding == "fsdp2" and accelerator.num_processes > 1
    blank = hollow(method) if spread else None
    prepare_blocks(method, settings)
    model: nn.Module = shard(method, accelerator) if spread else replicate(method, accelerator)
    bf16 = accelerator.mixed_precision == "bf16"
    optimizers = {phase: build_optimizers(method.parameters_of(phase), settings, bf16) for phase in method.phases}
    state = TrainState(
        method, optimizers, build_emas(method.averaged_parameters(), settings), settings, folder, identity, accelerator, Meters(), micro_batch, blank
    )
    if resumed:
        state.restore(resumed)
    parameters = dict(method.named_parameters())
    several = len(method.phases) > 1
    logger = _Logger(state, steps)

    with StopRequest() as request, logger.progress_bar():
        with logger.paused(), request.lifted():
            for interlude in due_interludes(interludes, state):
                interlude(state)
        loader = make_batches(state.step, micro_batches_a_step) if state.step < steps else iter(())
        for step in range(state.step, steps):
            images_seen = step * settings.batch
            batches = [prepare_batch(batch, accelerator.device) for batch in next(loader)]
            method.begin_step(images_seen)
            for number, phase in enumerate(method.phases):
                if not method.phase_active(phase, images_seen):
                    continue
                prefix = f"{phase}/" if several else ""
                for j, batch in enumerate(batches):
                    draw = (number * len(batches) + j) * accelerator.num_processes + accelerator.process_index
                    seed_step(seed, step, draw)
                    with communicating(model, accelerator, last=j == len(batches) - 1):
                        out = model(phase, batch, step)
                        accelerator.backward(out["loss"] / len(batches))
                    state.meters.add({prefix + name: value for name, value in out.items()})
                for optimizer in optimizers[phase]:
                    set_learning_rate(optimizer, learning_rate(settings, method.schedule_images(phase, images_seen)))
                if settings.clip_grad:
                    trained = [p for optimizer in optimizers[phase] for group in optimizer.param_groups for p in group["params"]]
                    state.meters.add({prefix + "grad_norm": whole(accelerator.clip_grad_norm_(trained, settings.clip_grad))})
                for optimizer in optimizers[phase]:
                    optimizer.step()
                for p in parameters.values():  # all of them: a generator's loss leaves gradients in its discriminator
                    p.grad = None
            with whole_parameters(method) if spread and implements(method, "after_step") else contextlib.nullcontext():
                method.after_step(step)
            state.step = step + 1
            for ema in state.emas:
                ema.update(parameters, state.step * settings.batch, settings.batch)

            pause = due_interludes(interludes, state)
            stop = request.agreed(state.step, last=bool(pause) or state.step == steps)
            logger.after_step()
            if stop or pause or due(settings.checkpoint_images, settings, state.step):
                with logger.paused():
                    if state.step == steps:
                        measure_at_the_end(state, make_batches, micro_batches_a_step, evaluated)
                    state.save()
            if stop:
                assert state.saved is not None
                raise Stopped(stop, state.saved)
            with logger.paused(), request.lifted() if pause else contextlib.nullcontext():
                for interlude in pause:
                    interlude(state)
    if state.saved is None:
        measure_at_the_end(state, make_batches, micro_batches_a_step, evaluated)
        state.save()
    return state


def wandb_run(folder: Path, identity: str) -> dict[str, str]:
    """What makes every start of a run, requeued ones included, go on in one W&B run: an id of its folder and configuration."""
    key = hashlib.sha256(f"{identity} {folder.resolve()}".encode()).hexdigest()[:16]
    return {"name": folder.name, "id": f"{identity}-{key}", "resume": "allow"}


class _Logger:
    """metrics.jsonl, trackers, the progress bar and the clock."""

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
        """Images done, images/s, time left and the loss, on stderr."""
        batch = self.state.settings.batch
        self.bar = progress_bar("train", self.steps * batch, self.state.step * batch, enabled=self.main, keep=True)
        self.last = (time.perf_counter(), self.state.step)
        with self.bar:
            yield
        for tracker in self.state.accelerator.trackers:  # end_training() would also end the processes' group, which the evaluation needs
            tracker.finish()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within the block does not count as training time."""
        start = time.perf_counter()
        yield
        self.last = (self.last[0] + time.perf_counter() - start, self.last[1])

    def after_step(self) -> None:
        """Advances the bar and, when a line is due, writes it and starts a new window."""
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
