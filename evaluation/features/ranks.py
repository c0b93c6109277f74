"""Communication between the ranks of an evaluation.

Without torch.distributed there is one process, and these functions do nothing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether torch.distributed is in use."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if active() else (0, 1)


def sum_over_ranks(tensor: Tensor) -> None:
    """Replaces a CPU tensor by its sum over all processes."""
    if active():
        moved = tensor.to(_device())
        dist.all_reduce(moved)
        tensor.copy_(moved)


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates the rows (N_rank, ...) of all processes and returns them on the CPU of every process.

    Processes may have different numbers of rows.
    """
    if not active():
        return rows
    _, size = rank_and_size()
    counts = torch.zeros(size, dtype=torch.int64)
    counts[dist.get_rank()] = len(rows)
    sum_over_ranks(counts)
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:], device=_device())
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(gathered, counts.tolist(), strict=True)])


def _device() -> torch.device:
    """The device on which the communication library expects its tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
