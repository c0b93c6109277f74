"""What a training step holds in memory, found by running it with fake tensors: their sizes are real,
their numbers are not, and nothing is allocated.

Counted is every tensor from its making to its end, as an allocator would see it, with the kernels that a CPU
would take. What a kernel takes inside, a library's workspace and an allocator's gaps are not in it.
launch/README.md compares it with what steps really take.
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
    """Fake tensors that are counted: the bytes of all that are alive, and the largest sum of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.gradients = self.peak_of_others = 0  # what of `live` is gradients, and the largest sum of the rest
        self.depth = 0  # of operations that are expressed by others: what a real kernel would not make is not counted
        self.seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def cache_enabled(self) -> bool:
        """Whether an operation may be answered from the cache: not within forward derivatives,
        whose checked layout that would break.
        """
        return forward_ad._current_level < 0

    @cache_enabled.setter
    def cache_enabled(self, wanted: bool) -> None:
        """The base class sets it once; what it wants is what is done outside forward derivatives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # some optimizers read their step count, and a fake has no number
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
        """Starts new peaks."""
        self.peak = self.peak_of_others = self.live

    def _forget(self, key: int, size: int) -> None:
        if self.seen.pop(key, None) is not None:
            self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process that shares nothing, for one micro-batch."""

    weights: int  # parameters and buffers, frozen networks included
    trained: int  # of these, what is trained; the gradients are as large
    largest_block: int  # of what is trained, the largest block
    outside_blocks: int  # of what is trained, what is in no block
    optimizer: int
    averages: int
    activations: int  # what the forward pass leaves for the backward pass, in the phase that leaves most
    peak: int  # of the whole step: all of the above, gradients, temporary tensors; gradients come while activations go
    peak_of_others: int  # the same without gradients


def step_memory(
    method_class: type[Method],
    config: Any,
    train: TrainConfig,
    data: DataInfo,
    micro_batch: int,
    accumulated: bool = False,
) -> StepMemory:
    """A training step of all phases with optimizer states in place,
    under bf16 autocast where `train.precision` is bf16.

    accumulated: whether gradients of other micro-batches are there when this one comes.
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
    """A step of gradients 0, which makes the optimizers' states."""
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
    """One phase as the trainer does it; returns what its forward pass left."""
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
