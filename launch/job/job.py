"""The state that all parts of a run's job share, and `agreed`."""

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
from pixlat.evaluation.records.parents import earlier_runs
from pixlat.methods import get_class
from pixlat.methods.base import DataInfo

Grid: TypeAlias = tuple[NDArray[np.uint8], list[str]]  # images (N, 3, H, W) row by row, and the names of the rows

# The arguments of `neighbour_picture`: samples and their nearest training images (both uint8), the distances between
# them, and the distances of held-out images to their nearest training images.
FoundNeighbours: TypeAlias = tuple[
    NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64], NDArray[np.float64] | None
]


@dataclass(frozen=True)
class Job:
    """One run with its folder, data and processes."""

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
        """The earlier runs that this one uses, for the record. Cached, because it verifies all their checkpoints."""
        return earlier_runs(self.run, self.model)

    @cached_property
    def training_cost(self) -> TrainingCost:
        """MACs of the training. Cached, because the count runs the method on the meta device."""
        return training_cost(get_class(self.run.method), self.model, self.info)

    @property
    def generates(self) -> bool:
        return get_class(self.run.method).task == "generation"


def agreed(answer: bool) -> bool:
    """Broadcasts the main process's answer. On a network file system each process may see different files."""
    return bool(broadcast_object_list([answer])[0])
