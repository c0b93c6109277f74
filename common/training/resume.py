"""Opens a checkpoint for all processes: the main process reads and verifies the files and broadcasts the tensors.

If each process read the files, 64 processes would read 20 GB each at every requeue, and a process on another machine
might not see the newest checkpoint yet.
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
class OpenCheckpoint:
    """An intact checkpoint. Only the main process opens its files."""

    path: Path
    facts: dict[str, Any]
    accelerator: Accelerator

    def tensors(self, stem: str) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor on this process's device) for each tensor of one file.

        All processes must call this together and consume it to the end.
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
        """Name, shape and dtype of each tensor of a file. The main process reads them and tells the others."""
        listing = None
        if self.accelerator.is_main_process:
            with safe_open(self.path / f"{stem}.safetensors", framework="pt") as file:
                names = file.keys()  # `file` is no dict and cannot be iterated
                listing = [(name, meta.shape, meta.dtype) for name in names for meta in [file.get_tensor(name)]]
        shared: list[tuple[str, torch.Size, torch.dtype]] = broadcast_object_list([listing])[0]
        return shared


def newest_checkpoint(folder: Path, identity: str, accelerator: Accelerator) -> OpenCheckpoint | None:
    """The newest intact checkpoint of a run folder, or None.

    Raises UserError in all processes if it belongs to another configuration.
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
    return OpenCheckpoint(path, facts, accelerator)


def last_good_checkpoint(folder: Path, accelerator: Accelerator) -> str:
    """A sentence for the message of a run that fails: which checkpoint is the last good one.

    Only the main process reads the folder; it broadcasts the answer, so that all processes print the same sentence.
    """
    newest = checkpoint.latest(folder / "checkpoints") if accelerator.is_main_process else None
    path = broadcast_object_list([newest])[0]
    return f"The last good checkpoint is {path}." if path else "No checkpoint had been written yet."
