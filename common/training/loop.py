"""The training loop of all methods.

It handles phases, optimizers, averages and checkpoints. It contains nothing about a particular method, loss or network.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator
from torch import nn

from pixlat.common.config.schema import TrainConfig
from pixlat.common.seeds import seed_step
from pixlat.common.training.data_passes import MakeBatches, measure_at_the_end, prepare_batch, run_before_training
from pixlat.common.training.ema import build_emas
from pixlat.common.training.log import TrainingLog
from pixlat.common.training.meters import Meters
from pixlat.common.training.optim import build_optimizers, learning_rate, set_learning_rate
from pixlat.common.training.resume import newest_checkpoint
from pixlat.common.training.setup import implements, prepare_blocks, replicate
from pixlat.common.training.sharding import communicating, gathered, meta_copy, shard, unsharded_parameters
from pixlat.common.training.signals import StopRequest
from pixlat.common.training.state import TrainState, load_state_without_external
from pixlat.common.training.steps import due, split_batch, total_steps

if TYPE_CHECKING:
    from pixlat.common.method import Method

# (N, task): a task that training runs every N images, on all processes. After a resume the task runs again if the
# checkpoint was written at such a point, because the previous start may have stopped in the middle of the task;
# it sees this from `state.start == state.step`. A task cannot disturb the training: each step reseeds.
Interlude = tuple[int, Callable[["TrainState"], None]]


class Stopped(Exception):
    """A signal asked the run to stop, and the run has saved a checkpoint."""

    def __init__(self, signal_name: str, saved: Path) -> None:
        super().__init__(f"stopped by {signal_name}; saved {saved}. Run the same command again to continue.")
        self.signal_number = int(signal.Signals[signal_name])


def due_interludes(interludes: Sequence[Interlude], state: TrainState) -> list[Callable[[TrainState], None]]:
    """The tasks that the training runs after the step it has just finished."""
    return [call for every, call in interludes if every and state.step and due(every, state.settings, state.step)]


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
    """Trains until `settings.images` images were shown. Continues from the newest intact checkpoint under `folder`.

    sharding: how several processes share the work, "ddp" or "fsdp2" (common/training/sharding.py).
    evaluated: the name of the average that evaluation samples with, or "raw".
        `method.after_training` measures with these weights.
    Raises UserError for a non-finite loss or an unwritable folder; the message names the last good checkpoint,
    which stays. Raises Stopped after SIGTERM, SIGUSR2 or Ctrl-C.
    """
    steps = total_steps(settings)
    method.to(accelerator.device).train()
    resumed = newest_checkpoint(folder, identity, accelerator)
    # a finished run draws no more random numbers, so any number of processes may open it to evaluate it
    unfinished = resumed and resumed.facts["step"] < steps
    micro_batch, micro_batches_a_step = split_batch(
        settings, accelerator.num_processes, resumed.facts.get("micro_batch") if resumed and unfinished else None
    )
    method.check_micro_batch(micro_batch)
    if resumed:
        load_state_without_external(method, dict(resumed.tensors("model")))
    else:
        run_before_training(method, make_batches, micro_batches_a_step, accelerator)
    sharded = sharding == "fsdp2" and accelerator.num_processes > 1
    meta_method = meta_copy(method) if sharded else None
    prepare_blocks(method, settings)
    model: nn.Module = shard(method, accelerator) if sharded else replicate(method, accelerator)
    bf16 = accelerator.mixed_precision == "bf16"
    optimizers = {phase: build_optimizers(method.parameters_of(phase), settings, bf16) for phase in method.phases}
    state = TrainState(
        method,
        optimizers,
        build_emas(method.averaged_parameters(), settings),
        settings,
        folder,
        identity,
        accelerator,
        Meters(),
        micro_batch,
        meta_method,
    )
    if resumed:
        state.restore(resumed)
    parameters = dict(method.named_parameters())
    several = len(method.phases) > 1
    logger = TrainingLog(state, steps)

    with StopRequest() as request, logger.progress_bar():
        with logger.paused(), request.signals_as_before():
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
                    trained = [
                        p
                        for optimizer in optimizers[phase]
                        for group in optimizer.param_groups
                        for p in group["params"]
                    ]
                    state.meters.add(
                        {prefix + "grad_norm": gathered(accelerator.clip_grad_norm_(trained, settings.clip_grad))}
                    )
                for optimizer in optimizers[phase]:
                    optimizer.step()
                for p in parameters.values():  # of all phases: a generator's loss leaves gradients in the discriminator
                    p.grad = None
            with (
                unsharded_parameters(method)
                if sharded and implements(method, "after_step")
                else contextlib.nullcontext()
            ):
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
            with logger.paused(), request.signals_as_before() if pause else contextlib.nullcontext():
                for interlude in pause:
                    interlude(state)
    if state.saved is None:
        measure_at_the_end(state, make_batches, micro_batches_a_step, evaluated)
        state.save()
    return state
