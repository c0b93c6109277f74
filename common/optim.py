"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW, Optimizer

from common.config import TrainConfig
from common.errors import UserError
from common.muon import Muon, NesterovAdam

if TYPE_CHECKING:
    from methods.base import ParamGroup


def learning_rate(train: TrainConfig, images_seen: int) -> float:
    """The learning rate of the step that starts after `images_seen` images: linear warm-up from 0, peak, then constant, cosine or linear."""
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
    """Sets lr times each group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def build_optimizers(groups: Iterable[ParamGroup], train: TrainConfig, bf16: bool = False) -> list[Optimizer]:
    """One optimizer a kind, for one phase of a method. bf16: whether the run computes under bf16 autocast; Muon's matrix products then do, too."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        weight_decay = train.weight_decay if group.weight_decay is None else group.weight_decay
        options = {"params": group.params, "lr_scale": group.lr_scale, "weight_decay": weight_decay, "split": group.split, "bf16": bf16}
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
    """torch's own: no bias corrections, Newton-Schulz in bfloat16; its updates are within some percent of ours."""
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"the optimizer torch_muon needs torch 2.9 or newer, this is {torch.__version__}. Use muon, or upgrade torch.")
    if fused := [tuple(p.shape) for group in groups if group["split"] > 1 for p in group["params"]]:
        raise UserError(f"the optimizer torch_muon cannot split fused matrices such as {fused[0]} into their parts. Use muon, which does.")
    return torch.optim.Muon(groups, lr=train.lr, momentum=0.95, nesterov=True)


BUILDERS: dict[str, Callable[[list[dict[str, Any]], TrainConfig], Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "nesterov_adam": _nesterov_adam,
    "torch_muon": _torch_muon,
}
