"""What a training needs before its first step: processes and device, replicas, compiled and recomputed blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import nn

from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.precision import resolve_precision, set_float32_products
from pixlat.common.processes import COLLECTIVE_TIMEOUT_MIN, join_processes
from pixlat.common.training.compiled import compile_blocks, compile_frozen
from pixlat.common.training.recompute import recompute_blocks

if TYPE_CHECKING:
    from pixlat.common.method import Method


def make_accelerator(
    settings: TrainConfig, folder: Path | None = None, timeout_min: float = COLLECTIVE_TIMEOUT_MIN
) -> Accelerator:
    """Processes, device, precision of products (common/precision.py) and trackers;
    parameters and optimizer state stay fp32.

    A process has one at a time: a later run of a sweep may have another precision,
    and an earlier accelerator then has it too.
    timeout_min: minutes that a process waits for the others in a collective.
    """
    for package in settings.trackers:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"train.trackers=[{package}] needs the package {package}: pip install 'pixlat[trackers]'.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    precision = resolve_precision(settings.precision, join_processes(timeout_min=timeout_min).device)
    set_float32_products(precision)
    AcceleratorState._reset_state()  # keeps the processes' connection
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_dir=folder,
    )


def replicate(method: Method, accelerator: Accelerator) -> nn.Module:
    """The method with gradients averaged over the processes, each of which holds all of it;
    the method itself where there is one process.
    """
    several = len(method.phases) > 1  # each leaves the others' networks alone
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=several, gradient_as_bucket_view=True
    )
    return accelerator.prepare_model(method)


def prepare_blocks(method: Method, settings: TrainConfig) -> None:
    """Compiles and recomputes blocks as the settings ask.

    Copies of the method are made before: a changed block stays bound to this one.

    With compiled blocks its frozen networks are compiled as well, and cuDNN times its convolutions to choose
    the fastest, whose rounding a restart may not find again; without, it chooses by rule.
    """
    torch.backends.cudnn.benchmark = settings.compile
    if settings.compile:
        compile_blocks(method, settings.recompute_blocks)
        compile_frozen(method)
    elif settings.recompute_blocks:
        recompute_blocks(method)


def implements(method: Method, name: str) -> bool:
    """Whether the method has a function of its own for what the base class leaves empty."""
    return sum(name in vars(each) for each in type(method).__mro__) > 1
