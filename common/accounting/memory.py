"""Estimates the memory of a training step by running it with fake tensors.

Fake tensors have shapes and sizes but no values, so nothing is allocated. The estimate counts every tensor from its
creation to its release, as an allocator would, with the kernels that PyTorch chooses on a CPU. It does not count the
memory that a kernel uses internally, library workspaces or gaps of the allocator.
launch/README.md compares these estimates with measured training steps.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from pixlat.common.accounting.macs import Fakes, begin_last_part, empty_batch, silent_copies
from pixlat.common.config.schema import TrainConfig
from pixlat.common.training.ema import build_emas
from pixlat.common.training.optim import build_optimizers
from pixlat.common.training.recompute import recompute_blocks

if TYPE_CHECKING:
    from pixlat.common.method import DataInfo, Method


class LiveBytes(Fakes):
    """A fake-tensor mode that counts the bytes of all live tensors and records the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.gradients = self.peak_of_others = 0  # bytes of gradients within `live`; largest sum of all other tensors
        # Nesting of operations: a fake operation may run others inside. Only results of the outermost one
        # are counted, because a real kernel would not create the inner ones.
        self.depth = 0
        self.seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def cache_enabled(self) -> bool:
        """Whether PyTorch may take an operation's result from its cache of fake results.

        It may not inside forward-mode differentiation: PyTorch checks the layout of tangents there,
        and a cached result would fail the check.
        """
        return forward_ad._current_level < 0

    @cache_enabled.setter
    def cache_enabled(self, wanted: bool) -> None:
        """Ignores the value: the base class sets it once, and the getter above decides."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Some optimizers read their step count as a Python number, which a fake tensor does not have.
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        self.depth += 1
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.depth -= 1
        if not self.depth:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak, self.peak_of_others = max(self.peak, self.live), max(self.peak_of_others, self.live - self.gradients)

    def restart(self) -> None:
        """Resets both peaks to the bytes that are live now."""
        self.peak = self.peak_of_others = self.live

    def _forget(self, key: int, size: int) -> None:
        if self.seen.pop(key, None) is not None:
            self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process without sharding, for one micro-batch."""

    weights: int  # parameters and buffers, frozen networks included
    trained: int  # trainable parameters alone; the gradients take as many bytes
    largest_block: int  # trainable parameters of the largest block
    outside_blocks: int  # trainable parameters outside all blocks
    optimizer: int  # optimizer states
    averages: int  # EMA copies
    activations: int  # tensors that the forward pass keeps for the backward pass, in the phase that keeps most
    # Largest sum of all live tensors during the step: all of the above, gradients and temporary tensors.
    # The backward pass frees activations while it creates gradients, so the two do not reach their maxima together.
    peak: int
    peak_of_others: int  # the largest sum without gradients


def step_memory(
    method_class: type[Method],
    config: Any,
    train: TrainConfig,
    data: DataInfo,
    micro_batch: int,
    accumulated: bool = False,
) -> StepMemory:
    """Measures a training step of all phases with optimizer states in place.

    The step runs under bf16 autocast if `train.precision` is bf16.
    accumulated: whether gradients of earlier micro-batches are already in memory (gradient accumulation).
    """
    with silent_copies(), LiveBytes() as memory:
        method = method_class(config, data).train()
        weights = memory.live
        if train.recompute_blocks:
            recompute_blocks(method)
        emas = build_emas(method.averaged_parameters(), train)
        averages = memory.live - weights
        optimizers = {phase: build_optimizers(method.parameters_of(phase), train) for phase in method.phases}
        for phase in method.phases:
            _update(method, optimizers[phase])
        optimizer = memory.live - weights - averages
        for p in (p for p in method.parameters() if p.requires_grad):
            p.register_post_accumulate_grad_hook(lambda p: _count_gradient(memory, p))
        memory.restart()
        activations = [
            _step(memory, method, phase, optimizers[phase], train.precision == "bf16", micro_batch, accumulated)
            for phase in method.phases
        ]
        peak, peak_of_others = memory.peak, memory.peak_of_others
        del emas
    inside = [_trained_bytes(block) for block in method.blocks()]
    trained = _trained_bytes(method)
    return StepMemory(
        weights,
        trained,
        max(inside, default=0),
        trained - sum(inside),
        optimizer,
        averages,
        max(activations),
        peak,
        peak_of_others,
    )


def _update(method: Method, optimizers: list[Optimizer]) -> None:
    """Steps the optimizers with zero gradients, so that they create their states."""
    _give_gradients(optimizers)
    for optimizer in optimizers:
        optimizer.step()
    method.zero_grad(set_to_none=True)


def _give_gradients(optimizers: list[Optimizer]) -> None:
    for p in (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)


def _count_gradient(memory: LiveBytes, parameter: Tensor) -> None:
    assert parameter.grad is not None
    memory.gradients += parameter.grad.nbytes


def _step(
    memory: LiveBytes,
    method: Method,
    phase: str,
    optimizers: list[Optimizer],
    bf16: bool,
    micro_batch: int,
    accumulated: bool,
) -> int:
    """Runs one phase as the trainer does; returns the bytes that its forward pass keeps for the backward pass."""
    if accumulated:
        _give_gradients(optimizers)
    batch = empty_batch(method.data, micro_batch, "cpu", method.needs_images(method.data))
    begin_last_part(method)
    before = memory.live
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = method(phase, batch, 0)["loss"]
    activations = memory.live - before
    loss.backward()
    del loss, batch
    for optimizer in optimizers:
        optimizer.step()
    method.zero_grad(set_to_none=True)
    memory.gradients = 0
    return activations


def _trained_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
