"""FSDP2: each process keeps a part of every parameter, gradient, optimizer state and average.

Without it, every tensor here is whole already.
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
    """Spreads the method's trained parameters over all processes, in place;
    they are gathered block by block while the loss is computed.

    What is frozen stays whole: it has no gradients to spread, and teachers run at any time.
    """
    frozen = {p for p in method.parameters() if not p.requires_grad}
    for tensor in (*method.parameters(), *method.buffers()):
        dist.broadcast(tensor.detach(), src=0)  # as DDP does: what is spread must be parts of one network
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in (*method.blocks(), method):
        fully_shard(module, mesh=mesh, ignored_params=frozen)
    forward = method.forward

    def in_mixed_precision(phase: str, batch: Batch, step: int) -> dict[str, Tensor]:
        with accelerator.autocast():
            out = forward(phase, batch, step)
        return {name: value.float() for name, value in out.items()}

    method.forward = in_mixed_precision  # type: ignore[method-assign]  # as accelerate does for other models
    return method


@contextlib.contextmanager
def communicating(model: nn.Module, accelerator: Accelerator, last: bool) -> Iterator[None]:
    """Processes exchange gradients in the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def gathered(tensor: Tensor) -> Tensor:
    """The tensor with the parts of all processes, who must all ask for it; a whole tensor is returned as it is.

    Rows are gathered by one blocking collective: in the gloo thread of `DTensor.full_tensor`'s asynchronous
    one a process died twice in some twenty runs of the tests.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != (Shard(0),):
        return tensor.full_tensor()  # a norm, which is a sum of parts
    part, processes = tensor.to_local().detach(), tensor.device_mesh.size()
    rows = -(-tensor.shape[0] // processes)  # of every part but the last ones, which may be shorter or empty
    padded = part.new_zeros(rows, *tensor.shape[1:])
    padded[: len(part)] = part
    gathered = part.new_empty(rows * processes, *tensor.shape[1:])
    dist.all_gather(list(gathered.chunk(processes)), padded, group=tensor.device_mesh.get_group())
    return gathered[: tensor.shape[0]]


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor of the parameter's shape, or a scalar, on the parameter's device; of a spread parameter,
    this process's part of it.
    """
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], accelerator: Accelerator) -> bool:
    """Whether no floating-point number of these tensors, spread or whole, is infinite or NaN in any process;
    all processes must ask.
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
def whole_parameters(method: Method) -> Iterator[None]:
    """Within the block the parameters of a spread method are whole, to be read; what is written into them is lost."""
    parts = [module for module in method.modules() if isinstance(module, FSDPModule)]
    for module in parts:
        module.unshard()
    try:
        yield
    finally:
        for module in parts:
            module.reshard()


def meta_copy(method: Method) -> Method:
    """A copy without the memory of its parameters, for `with_weights`; it shares the external networks."""
    outside = [method.get_submodule(name) for name in method.external]
    shared = {id(p) for module in outside for p in module.parameters()}
    memo: dict[int, object] = {id(module): module for module in outside}
    memo |= {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in method.parameters() if id(p) not in shared
    }
    return copy.deepcopy(method, memo)


@contextlib.contextmanager
def with_weights(blank: Method, state: Mapping[str, Tensor]) -> Iterator[Method]:
    """A hollow copy with this state (without external networks) for the length of the block;
    its memory is given back afterwards.
    """
    empty = {name: p.detach() for name, p in blank.named_parameters() if p.is_meta}
    blank.load_state_dict(dict(state), strict=False, assign=True)
    try:
        yield blank
    finally:
        blank.load_state_dict(empty, strict=False, assign=True)
