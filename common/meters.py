"""Running means of what a step reports, and the file they are written to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from common.files import read_rows, write_whole


@dataclass
class Meters:
    """Sums of scalars that stay on the device until somebody asks. Asking is the only host sync of the training loop."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Adds one observation of each scalar."""
        for name, value in scalars.items():
            value = value.detach().to(torch.float32, copy=True)  # two names may share a tensor, which a checkpoint cannot hold
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
    def of_process(cls, sums: Mapping[str, Tensor], counts: Mapping[str, int], process: int, processes: int, device: torch.device) -> Meters:
        """The inverse, for one process; where there were more or fewer of them, each has the mean."""
        own = {name: (value.flatten()[process] if value.numel() == processes else value.mean()).to(device) for name, value in sums.items()}
        return cls(own, dict(counts))

    def clear(self) -> None:
        """Starts a new window."""
        self.sums.clear()
        self.counts.clear()


def truncate_rows(file: Path, step: int) -> None:
    """Drops the lines after `step`: they will be written again by the resumed run."""
    rows = [row for row in read_rows(file) if row["step"] <= step]
    if file.exists():
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
