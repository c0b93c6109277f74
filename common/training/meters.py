"""Running means of the scalars that each step reports, and checks of metrics.jsonl, which holds them."""

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
MAX_VALUE = float(2**128)  # limit of a logged value, just above the largest float32; NaN is allowed


@dataclass
class Meters:
    """Sums of scalars, kept on the device. Reading them (`means`) is the only host sync of the training loop."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Adds one observation of each scalar."""
        for name, value in scalars.items():
            # a copy, because two names may share a tensor and safetensors refuses to save shared tensors
            value = value.detach().to(torch.float32, copy=True)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """The means since the last `clear`, over all processes, in sorted order of their names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(names, means.tolist(), strict=True))

    def of_all_processes(self) -> dict[str, Tensor]:
        """The sums of every process by name, each of shape (processes,). All processes must call this together."""
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
        """The meters of one process from what `of_all_processes` returned.

        If the number of processes has changed since then, each process gets the mean of the sums.
        """
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
    """Drops the lines after `step`, because the resumed run writes them again.

    Also drops damaged lines, with a warning that names them: a damaged log must not stop a run.
    """
    rows, damaged = split_rows(file)
    invalid = [row for row in rows if not is_metrics_row(row)]
    if damaged or invalid:
        places = _places(damaged, invalid)
        log.warning("%s: %d damaged lines are left out (%s)", file, len(damaged) + len(invalid), places)
    if file.exists():
        write_whole(
            file, "".join(json.dumps(row) + "\n" for row in rows if is_metrics_row(row) and row["step"] <= step)
        )


def is_metrics_row(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl holds only named numbers, among them valid "step" and "images"."""
    counts = all(isinstance(row.get(key), int) and 0 <= row[key] <= MAX_COUNT for key in ("step", "images"))
    return counts and all(isinstance(value, int | float) and not abs(value) > MAX_VALUE for value in row.values())


def _places(damaged: Sequence[int], invalid: Sequence[Mapping[str, Any]]) -> str:
    numbers = [f"line {number}" for number in damaged]
    return ", ".join([*numbers, *(f"step {str(row.get('step', 'unknown'))[:20]}" for row in invalid)][:5])
