"""Moves batches to the device, and runs a method's passes over the training data before and after its training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from pixlat.common.training.setup import implements
from pixlat.common.training.state import TrainState

if TYPE_CHECKING:
    from pixlat.common.method import Batch, Method

# (first step, micro-batches per step on this process) -> one list of micro-batches per step, each a dict with
# uint8 "image", "label" and "index"
MakeBatches = Callable[[int, int], Iterator[list[dict[str, Tensor]]]]


def prepare_batch(batch: dict[str, Tensor], device: torch.device) -> Batch:
    """Moves a micro-batch to the device, and converts its images from uint8 to float in [-1, 1]."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return {
        name: value.float().div_(127.5).sub_(1.0) if value.dtype == torch.uint8 else value
        for name, value in moved.items()
    }


def batches_of_all_ranks(batches: Iterator[Batch], processes: int) -> Generator[Batch, None, None]:
    """Yields the micro-batches of all processes in the order in which a single process would see them.

    Statistics over them therefore do not depend on the number of processes.
    """
    for batch in batches:
        if processes == 1:
            yield batch
            continue
        gathered = {name: [torch.empty_like(value) for _ in range(processes)] for name, value in batch.items()}
        for name, value in batch.items():
            dist.all_gather(gathered[name], value.contiguous())
        yield from ({name: values[rank] for name, values in gathered.items()} for rank in range(processes))


def run_before_training(
    method: Method, make_batches: MakeBatches, micro_batches_a_step: int, accelerator: Accelerator
) -> None:
    """Calls `method.before_training` with the batches of the training, from step 0 on.

    It runs in the precision of the training, so that both compute the same features.
    """
    with (
        batches_of_all_processes(make_batches, 0, micro_batches_a_step, accelerator) as batches,
        accelerator.autocast(),
    ):
        method.before_training(batches)


@contextlib.contextmanager
def batches_of_all_processes(
    make_batches: MakeBatches, start_step: int, micro_batches_a_step: int, accelerator: Accelerator
) -> Iterator[Iterator[Batch]]:
    """The micro-batches of all processes, from `start_step` of the training on.

    The loader processes start when the caller takes the first batch, and end with the block.
    """

    def own() -> Iterator[Batch]:
        for batches in make_batches(start_step, micro_batches_a_step):
            yield from (prepare_batch(batch, accelerator.device) for batch in batches)

    with contextlib.closing(batches_of_all_ranks(own(), accelerator.num_processes)) as batches:
        yield batches


def measure_at_the_end(state: TrainState, make_batches: MakeBatches, micro_batches_a_step: int, average: str) -> None:
    """Calls `method.after_training` and copies the results into the method's buffers, for the last checkpoint."""
    if not implements(state.method, "after_training"):
        return
    batches_of_all = batches_of_all_processes(make_batches, state.step, micro_batches_a_step, state.accelerator)
    with batches_of_all as batches, state.weights(average) as method:
        measured = method.after_training(batches)
    for name, value in measured.items():
        state.method.get_buffer(name).copy_(value)
