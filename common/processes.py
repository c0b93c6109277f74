"""Joining the other processes of a run, for training and evaluation alike: on what device they compute,
and how long one of them waits for the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from pixlat.common.errors import UserError

# How long a process waits in a collective before it gives the others up. torch's limit for NCCL is 10 minutes,
# which the main process may well spend on pictures, on a checkpoint of many gigabytes or on the listing of a large
# folder while the others wait for it.
COLLECTIVE_TIMEOUT_MIN = 360.0
MEETING_TIMEOUT_MIN = 15.0  # how long the processes of one start may take to find each other
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join_processes(cpu: bool = False, timeout_min: float = COLLECTIVE_TIMEOUT_MIN) -> PartialState:
    """This process among those of its run, as torchrun or a scheduler started them;
    only the first call of a process connects them.

    cpu: compute on CPUs even where there is an accelerator, as ACCELERATE_USE_CPU=true asks as well.
    timeout_min: minutes that a process waits in a collective.
        A start whose processes do not find each other is a UserError.
    """
    several = started_processes() > 1
    cpu = cpu or _cpu_is_asked_for() or (several and not _can_connect_accelerators())
    connection = _meet(timedelta(minutes=MEETING_TIMEOUT_MIN)) if several and not dist.is_initialized() else {}
    state = PartialState(cpu=cpu, timeout=timedelta(minutes=timeout_min), **connection)
    if state.num_processes != started_processes():
        raise UserError(
            f"the launcher started {started_processes()} processes (WORLD_SIZE), "
            f"but accelerate sees {state.num_processes}, so that each would do the whole run. "
            "Start them with `torchrun --nproc-per-node N`, or unset WORLD_SIZE for a single process."
        )
    return state


def started_processes() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _meet(patience: timedelta) -> dict[str, Any]:
    """Waits until all processes of this start are there; the limit for collectives would be far too patient
    with one that never comes.
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
            f"the {world} processes of this start did not all come to {place} within {patience.total_seconds() / 60:g} "
            f"minutes: {str(error).splitlines()[0]} Look at the logs of the others; "
            "one of them failed or was not started."
        ) from error
    return {"store": store, "rank": rank, "world_size": world}


def _cpu_is_asked_for() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")


def _can_connect_accelerators() -> bool:
    """Whether this machine has devices between which processes can exchange tensors; an Apple GPU is not one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device is not None and device.type != "mps"
