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
            value = value.detach().float()
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

    def clear(self) -> None:
        """Starts a new window."""
        self.sums.clear()
        self.counts.clear()


def truncate_rows(file: Path, step: int) -> None:
    """Drops the lines after `step`: they will be written again by the resumed run."""
    rows = [row for row in read_rows(file) if row["step"] <= step]
    if file.exists():
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
