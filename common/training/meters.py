"""Running means of what a step reports, and the file they are written to."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pixlat.common.files import read_rows, split_rows, write_whole

__all__ = ["Meters", "read_rows", "truncate_rows"]
log = logging.getLogger("pixlat")
MAX_COUNT = 10**15  # steps and images
MAX_VALUE = float(2**128)  # of a quantity that a log holds: beyond the largest float32; NaN is allowed


@dataclass
class Meters:
    """Sums of scalars that stay on the device until somebody asks.

    Asking is the only host sync of the training loop.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Adds one observation of each scalar."""
        for name, value in scalars.items():
            # two names may share a tensor, which a checkpoint cannot hold
            value = value.detach().to(torch.float32, copy=True)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since the last `clear`, over all processes, by name in sorted order."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(names, means.tolist(), strict=True))

    def of_all_processes(self) -> dict[str, Tensor]:
        """The sums by name, (processes,) each; all processes must ask."""
        if not (dist.is_available() and dist.is_initialized() and self.sums):
            return {name: value.reshape(1) for name, value in self.sums.items()}
        names = sorted(self.sums)
        own = torch.stack([self.sums[name] for name in names])
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        return dict(zip(names, torch.stack(gathered, dim=1), strict=True))

    @classmethod
    def of_process(
        cls, sums: Mapping[str, Tensor], counts: Mapping[str, int], process: int, processes: int, device: torch.device
    ) -> Meters:
        """The inverse, for one process; where there were more or fewer of them, each has the mean."""
        own = {
            name: (value.flatten()[process] if value.numel() == processes else value.mean()).to(device)
            for name, value in sums.items()
        }
        return cls(own, dict(counts))

    def clear(self) -> None:
        """Starts a new window."""
        self.sums.clear()
        self.counts.clear()


def truncate_rows(file: Path, step: int) -> None:
    """Drops the lines after `step`, which the resumed run will write again, and damaged ones, which are named:
    a log must not keep a run from going on.
    """
    rows, damaged = split_rows(file)
    odd = [row for row in rows if not is_metrics_row(row)]
    if damaged or odd:
        log.warning("%s: %d damaged lines are left out (%s)", file, len(damaged) + len(odd), _places(damaged, odd))
    if file.exists():
        write_whole(
            file, "".join(json.dumps(row) + "\n" for row in rows if is_metrics_row(row) and row["step"] <= step)
        )


def is_metrics_row(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl holds numbers under names,
    with the step and the images of its moment among them.
    """
    counts = all(isinstance(row.get(key), int) and 0 <= row[key] <= MAX_COUNT for key in ("step", "images"))
    return counts and all(isinstance(value, int | float) and not abs(value) > MAX_VALUE for value in row.values())


def _places(damaged: Sequence[int], odd: Sequence[Mapping[str, Any]]) -> str:
    numbers = [f"line {number}" for number in damaged]
    return ", ".join([*numbers, *(f"step {str(row.get('step', 'unknown'))[:20]}" for row in odd)][:5])
