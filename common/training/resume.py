"""Taking up a checkpoint with several processes: the main one reads and verifies the files,
and the others get their tensors from it.

Else each of 64 processes would read 20 GB at every requeue, and one on another machine might
not see the newest checkpoint yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from torch import Tensor

from pixlat.common.errors import UserError
from pixlat.common.weights import checkpoint


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, whose files only the main process opens."""

    path: Path
    facts: dict[str, Any]
    accelerator: Accelerator

    def tensors(self, stem: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor on this process's device) of one file, one after the other;
        all processes must ask, and to the end.
        """
        device, main = self.accelerator.device, self.accelerator.is_main_process
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(safe_open(self.path / f"{stem}.safetensors", framework="pt")) if main else None
            for name, shape, dtype in self._listing(stem):
                value = (
                    torch.empty(shape, dtype=dtype, device=device) if file is None else file.get_tensor(name).to(device)
                )
                if self.accelerator.num_processes > 1:
                    dist.broadcast(value, src=0)
                yield name, value

    def _listing(self, stem: str) -> list[tuple[str, torch.Size, torch.dtype]]:
        """Name, shape and type of the tensors of a file, from the main process, which reads its header alone."""
        listing = None
        if self.accelerator.is_main_process:
            with safe_open(self.path / f"{stem}.safetensors", framework="pt") as file:
                # not a dict
                listing = [(name, meta.shape, meta.dtype) for name in file.keys() for meta in [file.get_tensor(name)]]  # noqa: SIM118
        found: list[tuple[str, torch.Size, torch.dtype]] = broadcast_object_list([listing])[0]
        return found


def newest_checkpoint(folder: Path, identity: str, accelerator: Accelerator) -> Found | None:
    """The newest whole checkpoint of a run folder, if there is one;
    one of another configuration is a UserError in all processes.
    """
    path = checkpoint.latest(folder / "checkpoints") if accelerator.is_main_process else None
    path, facts = broadcast_object_list([(path, checkpoint.load_facts(path) if path else None)])[0]
    if path is None:
        return None
    if facts["identity"] != identity:
        raise UserError(
            f"{path} belongs to another configuration ({facts['identity']} instead of {identity}). "
            "Choose another name= or out=."
        )
    return Found(path, facts, accelerator)


def last_good_checkpoint(folder: Path, accelerator: Accelerator) -> str:
    """A sentence for a run that fails, the same in all processes: only the main one looks,
    and one that did not must not say that there is none.
    """
    found = broadcast_object_list([checkpoint.latest(folder / "checkpoints") if accelerator.is_main_process else None])[
        0
    ]
    return f"The last good checkpoint is {found}." if found else "No checkpoint had been written yet."
