"""Divides a training into steps and a batch into micro-batches, and says after which steps something is due."""

from __future__ import annotations

import math

from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError


def split_batch(settings: TrainConfig, processes: int, began_with: int | None = None) -> tuple[int, int]:
    """(micro-batch size, micro-batches per step and process), from the global batch.

    began_with: the micro-batch size of the run's earlier steps. A resumed run keeps it on any number of processes,
        because each micro-batch draws its random numbers from a separate seed.
    """
    micro_batch = settings.micro_batch or began_with or settings.batch // processes
    if micro_batch and settings.batch % (micro_batch * processes) == 0:
        return micro_batch, settings.batch // (micro_batch * processes)
    if began_with and not settings.micro_batch:
        raise UserError(
            f"this run has been training with micro-batches of {began_with} images, and {processes} processes "
            f"cannot divide a batch of {settings.batch} evenly into them. The random draws depend on the micro-batch, "
            f"so it cannot change: continue with a number of processes that divides {settings.batch // began_with}. "
            "If memory is short, cluster.sharding=fsdp2 and train.recompute_blocks=true change no result; "
            "another micro-batch needs a new run."
        )
    raise UserError(
        f"train.batch={settings.batch} is not a multiple of train.micro_batch={micro_batch} times {processes} "
        "processes. Choose a micro-batch that divides the global batch evenly."
    )


def total_steps(settings: TrainConfig) -> int:
    """Optimizer steps until the network has seen `train.images` images; the last batch may exceed that number."""
    return math.ceil(settings.images / settings.batch)


def due(every_images: int, settings: TrainConfig, step: int) -> bool:
    """Whether the step that has just ended reached a multiple of `every_images`, or was the last step."""
    return (
        step == total_steps(settings)
        or step * settings.batch // every_images > (step - 1) * settings.batch // every_images
    )
