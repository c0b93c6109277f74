"""How a training is divided: steps, micro-batches, and the steps after which something is due."""

from __future__ import annotations

import math

from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError


def split_batch(settings: TrainConfig, processes: int, began_with: int | None = None) -> tuple[int, int]:
    """(images a process takes at once, how often it does so each step), from the global batch.

    began_with: the micro-batch of the run's earlier steps, which it keeps on any number of processes:
    each micro-batch has random numbers of its own.
    """
    micro_batch = settings.micro_batch or began_with or settings.batch // processes
    if micro_batch and settings.batch % (micro_batch * processes) == 0:
        return micro_batch, settings.batch // (micro_batch * processes)
    if began_with and not settings.micro_batch:
        raise UserError(
            f"this run has been training with micro-batches of {began_with} images, which {processes} processes "
            f"cannot share out evenly in a batch of {settings.batch}. Its random draws depend on them, "
            f"so they stay: go on with a number of processes that divides {settings.batch // began_with}. "
            "Where memory is short, cluster.sharding=fsdp2 and train.recompute_blocks=true change no result; "
            "another micro-batch is a new run."
        )
    raise UserError(
        f"train.batch={settings.batch} is not a multiple of train.micro_batch={micro_batch} times {processes} "
        "processes. Choose a micro-batch that divides the global batch evenly."
    )


def total_steps(settings: TrainConfig) -> int:
    """Optimizer steps until `train.images` images have been shown; the last step may go beyond by part of a batch."""
    return math.ceil(settings.images / settings.batch)


def due(every_images: int, settings: TrainConfig, step: int) -> bool:
    """Whether the step that has just ended was the one that passed a multiple of `every_images`, or was the last."""
    return (
        step == total_steps(settings)
        or step * settings.batch // every_images > (step - 1) * settings.batch // every_images
    )
