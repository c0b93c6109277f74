"""One run, with what its parts share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray

from pixlat.common.accounting.macs import TrainingCost, training_cost
from pixlat.common.config.schema import RunConfig
from pixlat.common.datasets.load import DataSource
from pixlat.launch.job.stages import earlier_runs
from pixlat.methods import get_class
from pixlat.methods.base import DataInfo

Grid: TypeAlias = tuple[NDArray[np.uint8], list[str]]  # images (N, 3, H, W) row by row, and the names of the rows

# Samples, their nearest training images (both uint8), their distances, and those of held-out images:
# the arguments of `neighbour_picture`
FoundNeighbours: TypeAlias = tuple[
    NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64] | None
]


@dataclass(frozen=True)
class Job:
    """One run, with what its parts share."""

    run: RunConfig
    model: Any  # `run.model` with the run folders of earlier stages in place
    folder: Path
    source: DataSource
    info: DataInfo
    accelerator: Accelerator

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @cached_property
    def earlier(self) -> list[dict[str, Any]]:
        """The runs that this one is built on, for the record; looked up once,
        since every file of their checkpoints is verified.
        """
        return earlier_runs(self.run, self.model)

    @cached_property
    def training_cost(self) -> TrainingCost:
        """MACs of the training; counted once, since a count runs the method on shapes."""
        return training_cost(get_class(self.run.method), self.model, self.info)

    @property
    def generates(self) -> bool:
        return get_class(self.run.method).task == "generation"


def agreed(answer: bool) -> bool:
    """The main process's answer, in all processes: on a network file system each of them may see other files."""
    return bool(broadcast_object_list([answer])[0])


def spread(length: int, count: int) -> NDArray[np.int64]:
    """At most `count` positions, evenly spaced over a sequence that may be sorted by class or style."""
    return np.unique(np.linspace(0, length - 1, min(count, length)).round().astype(np.int64))
