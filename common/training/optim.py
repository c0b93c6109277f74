"""Builds optimizers and learning-rate schedules, and converts an optimizer's state to and from named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pixlat.common.config.schema import TrainConfig
from pixlat.common.errors import UserError
from pixlat.common.training.muon import Muon, NesterovAdam
from pixlat.common.training.sharding import placed_like

if TYPE_CHECKING:
    from pixlat.common.method import ParamGroup


def learning_rate(train: TrainConfig, images_seen: int) -> float:
    """The learning rate of the step that starts after `images_seen` images.

    It rises linearly from 0, stays at the peak for `hold_images`, then follows `train.schedule`.
    """
    if images_seen < train.warmup_images:
        return train.lr * images_seen / train.warmup_images
    start = train.warmup_images + train.hold_images
    progress = min(1.0, max(0, images_seen - start) / max(1, train.images - start))
    if train.schedule == "cosine":
        return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if train.schedule == "linear":
        return train.lr + (train.min_lr - train.lr) * progress
    return train.lr


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of each parameter group to lr times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_optimizers(groups: Iterable[ParamGroup], train: TrainConfig, bf16: bool = False) -> list[Optimizer]:
    """Builds one optimizer for each kind (adamw, muon, ...) among the parameter groups of one phase.

    bf16: whether the run uses bf16 autocast; Muon then computes its matrix products in bf16, too.
    """
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        weight_decay = train.weight_decay if group.weight_decay is None else group.weight_decay
        options = {
            "params": group.params,
            "lr_scale": group.lr_scale,
            "weight_decay": weight_decay,
            "split": group.split,
            "bf16": bf16,
        }
        options |= {} if group.betas is None else {"betas": group.betas}
        by_kind.setdefault(group.kind, []).append(options)
    if unknown := by_kind.keys() - BUILDERS.keys():
        raise UserError(f"optimizer kinds {sorted(unknown)} are not known. Kinds: {', '.join(BUILDERS)}.")
    return [BUILDERS[kind](options, train) for kind, options in by_kind.items()]


def _adamw(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices <= {"cpu", "cuda"} and all(torch.is_floating_point(p) for group in groups for p in group["params"])
    return AdamW(groups, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps, fused=fused)


def _muon(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    return Muon(groups, lr=train.lr)


def _nesterov_adam(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    return NesterovAdam(groups, lr=train.lr, betas=(train.betas[0], train.betas[1]), eps=train.eps)


def _torch_muon(groups: list[dict[str, Any]], train: TrainConfig) -> Optimizer:
    """torch.optim.Muon. It has no bias corrections and runs Newton-Schulz in bfloat16.

    Its updates differ from those of our Muon by a few percent.
    """
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"the optimizer torch_muon needs torch 2.9 or newer, this is {torch.__version__}. "
            "Use muon, or upgrade torch."
        )
    if fused := [tuple(p.shape) for group in groups if group["split"] > 1 for p in group["params"]]:
        raise UserError(
            f"the optimizer torch_muon cannot split fused matrices such as {fused[0]} into their parts. "
            "Use muon, which splits them."
        )
    return torch.optim.Muon(groups, lr=train.lr, momentum=0.95, nesterov=True)


BUILDERS: dict[str, Callable[[list[dict[str, Any]], TrainConfig], Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "nesterov_adam": _nesterov_adam,
    "torch_muon": _torch_muon,
}


def optimizer_state(optimizer: Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """An optimizer's state as a flat dict of tensors named "<parameter name>/<state key>".

    It holds no hyper-parameters: those come from the configuration.
    """
    state = {f"{names[p]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}
    if not_tensors := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        raise TypeError(f"optimizer state that is not a tensor cannot be saved: {not_tensors[:5]}")
    return state


def load_optimizer_state(optimizer: Optimizer, state: Iterable[tuple[str, Tensor]], names: Mapping[Any, str]) -> None:
    """Loads what `optimizer_state` returned. Moves each tensor to its parameter's device and keeps its saved dtype."""
    parameters = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    for key, value in state:
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise UserError(
                f"the checkpoint has optimizer state for {name!r}, which this configuration does not train."
            )
        p = parameters[name]
        # torch keeps a scalar step counter on the CPU unless the optimizer is fused; so do we.
        on_cpu = value.ndim == 0 and not optimizer.defaults.get("fused")
        optimizer.state[p][entry] = value.cpu() if on_cpu else placed_like(value, p)
