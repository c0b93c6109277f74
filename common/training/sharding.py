"""FSDP2: each process keeps a part of every parameter, gradient, optimizer state and average.

Without FSDP2 each process has full tensors, and the functions here return them unchanged.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pixlat.common.method import Batch, Method


def shard(method: Method, accelerator: Accelerator) -> Method:
    """Shards the method's trained parameters over all processes, in place.

    FSDP2 gathers them block by block for the forward and the backward pass. Frozen parameters are not sharded:
    they have no gradients, and a method may call its teachers at any time.
    """
    frozen = {p for p in method.parameters() if not p.requires_grad}
    for tensor in (*method.parameters(), *method.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # as DDP does: all shards must come from the same initial weights
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*method.blocks(), method):
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    forward = method.forward

    def in_mixed_precision(phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        with accelerator.autocast():
            out = forward(phase, batch, step)
        return {name: value.float() for name, value in out.items()}

    method.forward = in_mixed_precision  # type: ignore[method-assign]  # accelerate does the same for DDP
    return method


@contextlib.contextmanager
def communicating(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Lets the processes exchange gradients only after the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; all processes must call this together. Returns a full tensor as it is.

    One blocking collective gathers the rows. `DTensor.full_tensor` uses an asynchronous one instead; with gloo
    a process died in its thread twice in some twenty runs of the tests.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),):
        return tensor.full_tensor()  # a gradient norm: a sum of the processes' parts
    part, processes = tensor.to_local().detach(), tensor.device_mesh.size()
    rows = -(-tensor.shape[0] // processes)  # of each part; the last parts may be shorter or empty and are padded
    padded = part.new_zeros(rows, *tensor.shape[1:])
    padded[: len(part)] = part
    gathered = part.new_empty(rows * processes, *tensor.shape[1:])
    dist.all_gather(list(gathered.chunk(processes)), padded, group=tensor.device_mesh.get_group())
    return gathered[: tensor.shape[0]]


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Moves a full tensor of the parameter's shape, or a scalar, to the parameter's device.

    If the parameter is sharded, keeps only this process's part of the tensor.
    """
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], accelerator: Accelerator) -> bool:
    """Whether all floating-point numbers of these tensors are finite in all processes.

    The tensors may be sharded or full. All processes must call this together.
    """
    parts = [
        value.to_local() if isinstance(value, DTensor) else value for value in tensors if value.is_floating_point()
    ]
    largest = [torch.zeros(()), *torch._foreach_norm([part for part in parts if part.numel()], math.inf)]
    spoilt = (
        torch.stack([value.float().to(accelerator.device) for value in largest])
        .isfinite()
        .logical_not()
        .any()
        .float()
        .reshape(1)
    )
    return not accelerator.reduce(spoilt, "sum").any()


@contextlib.contextmanager
def unsharded_parameters(method: Method) -> Iterator[None]:
    """Within the block the parameters of a sharded method are full tensors to read; changes to them are lost."""
    parts = [module for module in method.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.reshard()


def meta_copy(method: Method) -> Method:
    """A copy whose parameters are on the meta device and use no memory, for `with_weights`.

    The copy shares the external networks with the method.
    """
    outside = [method.get_submodule(name) for name in method.external]
    shared = {id(p) for module in outside for p in module.parameters()}
    memo: dict[int, object] = {id(module): module for module in outside}
    memo |= {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters() if id(p) not in shared
    }
    return copy.deepcopy(method, memo)


@contextlib.contextmanager
def with_weights(meta_method: Method, state: Mapping[str, Tensor]) -> Iterator[Method]:
    """Within the block a `meta_copy` has the weights of `state`; afterwards it drops them and frees their memory.

    state: the full tensors of `state_without_external`.
    """
    empty = {name: p.detach() for name, p in meta_method.named_parameters() if p.is_meta}
    meta_method.load_state_dict(dict(state), strict=False, assign=True)
    try:
        yield meta_method
    finally:
        meta_method.load_state_dict(empty, strict=False, assign=True)
