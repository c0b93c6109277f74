"""Connects the processes of a run, for training and evaluation: chooses their device and how long they wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from pixlat.common.errors import UserError

# How long a process waits in a collective before it fails. torch's limit for NCCL is 10 minutes, which is too short:
# the main process may need longer for pictures, a checkpoint of many gigabytes or the listing of a large folder,
# while the others wait for it.
COLLECTIVE_TIMEOUT_MIN = 360.0
MEETING_TIMEOUT_MIN = 15.0  # how long the processes of a start may need to connect to each other
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join_processes(cpu: bool = False, timeout_min: float = COLLECTIVE_TIMEOUT_MIN) -> PartialState:
    """Connects this process to the others that torchrun or a scheduler started. Later calls change nothing.

    cpu: compute on CPUs even if there is a GPU; ACCELERATE_USE_CPU=true does the same.
    timeout_min: minutes that a process waits in a collective.
    Raises UserError if the processes do not find each other.
    """
    several = started_processes() > 1
    cpu = cpu or _cpu_is_asked_for() or (several and not _can_connect_accelerators())
    connection = _meet(timedelta(minutes=MEETING_TIMEOUT_MIN)) if several and not dist.is_initialized() else {}
    state = PartialState(cpu=cpu, timeout=timedelta(minutes=timeout_min), **connection)
    if state.num_processes != started_processes():
        raise UserError(
            f"the launcher started {started_processes()} processes (WORLD_SIZE), "
            f"but accelerate sees {state.num_processes}, so each process would do the whole run. "
            "Start them with `torchrun --nproc-per-node N`, or unset WORLD_SIZE for a single process."
        )
    return state


def started_processes() -> int:
    """The number of processes that the launcher started (WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _meet(patience: timedelta) -> dict[str, Any]:
    """Waits until all processes of this start are connected. Returns the arguments for `PartialState`.

    It has a shorter limit than collectives have, because a process that failed to start never connects.
    """
    if missing := [name for name in LAUNCHER_VARIABLES if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={started_processes()} says that several processes were started, but {', '.join(missing)} "
            "is not set. Start them with `torchrun --nproc-per-node N`, or unset WORLD_SIZE for a single process."
        )
    world = started_processes()
    try:
        meeting: Iterator[tuple[dist.Store, int, int]] = dist.rendezvous("env://", timeout=patience)
        store, rank, _ = next(meeting)
        store.set(f"pixlat/here/{rank}", "")
        store.wait([f"pixlat/here/{other}" for other in range(world)], patience)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the {world} processes of this start did not all connect to {place} within "
            f"{patience.total_seconds() / 60:g} minutes: {str(error).splitlines()[0]} "
            "Look at the logs of the others; one of them failed or did not start."
        ) from error
    return {"store": store, "rank": rank, "world_size": world}


def _cpu_is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def _can_connect_accelerators() -> bool:
    """Whether processes on this machine can exchange tensors between accelerators. Apple GPUs cannot."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"
