"""Prepares a training before its first step: processes and device, DDP, compiled and recomputed blocks."""

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
    """Sets up processes, device, precision of products (common/precision.py) and trackers.

    Parameters and optimizer state stay fp32. accelerate shares its state within a process: if a later run of a sweep
    has another precision, earlier accelerators of this process have that precision from then on.
    timeout_min: minutes that a process waits for the others in a collective.
    """
    for package in settings.trackers:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"train.trackers=[{package}] needs the package {package}: pip install 'pixlat[trackers]'.")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    precision = resolve_precision(settings.precision, join_processes(timeout_min=timeout_min).device)
    set_float32_products(precision)
    AcceleratorState._reset_state()  # drops the precision of an earlier run, but keeps the process group
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_dir=folder,
    )


def replicate(method: Method, accelerator: Accelerator) -> nn.Module:
    """The method wrapped in DDP, which averages gradients over the processes; with one process, not wrapped."""
    several = len(method.phases) > 1  # a phase computes no gradients for the networks of the other phases
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        find_unused_parameters=several, gradient_as_bucket_view=True
    )
    return accelerator.prepare_model(method)


def prepare_blocks(method: Method, settings: TrainConfig) -> None:
    """Applies train.compile and train.recompute_blocks to the method's blocks.

    Copy a method before this call, not after: the changed blocks of a copy would still call those of the original.

    train.compile also compiles the frozen networks, and lets cuDNN choose the fastest convolutions by timing them.
    A restart may choose others, which round differently. Without train.compile cuDNN chooses by fixed rules.
    """
    torch.backends.cudnn.benchmark = settings.compile
    if settings.compile:
        compile_blocks(method, settings.recompute_blocks)
        compile_frozen(method)
    elif settings.recompute_blocks:
        recompute_blocks(method)


def implements(method: Method, name: str) -> bool:
    """Whether the method overrides a function that the base class leaves empty."""
    return sum(name in vars(cls) for cls in type(method).__mro__) > 1
