"""The pair of optimizers that pMF trains with: Muon for matrices, Adam with Nesterov's momentum for everything else.

Both correct the bias of their averages at the point where Nesterov's step looks: with b the decay and n the number of steps, counted from 1,

    m <- b m + (1 - b) g,        u = b m / (1 - b^(n+1)) + (1 - b) g / (1 - b^n).

A parameter's step count is a scalar on the CPU, so that the corrections are known without waiting for a device.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
MAX_STACKED = 2**24  # numbers orthogonalised at once: bounds the working memory at a few times 64 MB whatever the network's size


def newton_schulz(matrices: Tensor, eps: float = 1e-8) -> Tensor:
    """The orthogonal factor of each matrix of a stack (N, R, C), approximately: singular values between about 0.7 and 1.2, directions kept.

    Five steps of the quintic iteration X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X with A = X X^T, from X scaled to Frobenius norm 1, in the
    precision given. Singular values below about 1e-3 of the norm are not lifted as far; zero stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(Optimizer):
    """p <- p - lr (sqrt(max(1, rows / columns)) NewtonSchulz(u) + weight_decay p), for matrices (rows, columns) only.

    With `split` = k in a group, each of its matrices is k matrices stacked along dim 0 (a fused q, k, v has 3), treated alone; rows then counts one
    of them. Matrices of the same shape are orthogonalised in one batch.
    """

    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.0, split: int = 1, eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "split": split, "eps": eps})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2 or p.shape[0] % group["split"]:
                    raise ValueError(f"Muon takes matrices whose rows are a multiple of split={group['split']}, not {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """One step."""
        for group in self.param_groups:
            for params in _batches(_with_gradient(group)):
                self._step(params, group)

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Steps parameters of one shape together."""
        momentum = group["momentum"]
        gradients = _gradients(params)
        averages = _entries(self, params, "momentum")
        now, ahead = _corrections(_count(self, params), momentum)
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_mul(averages, [momentum / c for c in ahead])
        torch._foreach_add_(updates, torch._foreach_mul(gradients, [(1 - momentum) / c for c in now]))

        rows, columns = params[0].shape[0] // group["split"], params[0].shape[1]
        orthogonal = newton_schulz(torch.cat([u.reshape(-1, rows, columns) for u in updates]), group["eps"]).reshape(len(params), -1, columns)
        _decay(params, group)
        torch._foreach_add_(params, orthogonal.unbind(), alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


class NesterovAdam(Optimizer):
    """p <- p - lr (u / (sqrt(v / (1 - b2^n)) + eps) + weight_decay p) with v the average of g^2. Not torch's NAdam, which schedules its momentum."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """One step."""
        for group in self.param_groups:
            if params := _with_gradient(group):
                self._step(params, group)

    def _step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        b1, b2 = group["betas"]
        lr = group["lr"]
        gradients = _gradients(params)
        averages, squares = _entries(self, params, "average"), _entries(self, params, "square")
        steps = _count(self, params)
        now, ahead = _corrections(steps, b1)
        torch._foreach_lerp_(averages, gradients, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, [math.sqrt(1 - b2**n) for n in steps])
        torch._foreach_add_(denominators, group["eps"])
        _decay(params, group)
        torch._foreach_addcdiv_(params, averages, denominators, [-lr * b1 / c for c in ahead])
        torch._foreach_addcdiv_(params, gradients, denominators, [-lr * (1 - b1) / c for c in now])


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [p for p in group["params"] if p.grad is not None]


def _gradients(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _batches(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of the same shape, device and type together, at most MAX_STACKED numbers (or one parameter) at a time."""
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        alike[p.shape, p.device, p.dtype].append(p)
    for same in alike.values():
        size = max(1, MAX_STACKED // same[0].numel())
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _entries(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """A tensor of the parameter's shape in each one's state, zero at first."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p)
    return [optimizer.state[p][name] for p in params]


def _count(optimizer: Optimizer, params: list[Tensor]) -> list[float]:
    """Advances the parameters' step counts and returns them, from 1."""
    counts = [optimizer.state[p].setdefault("step", torch.zeros((), device="cpu")) for p in params]
    torch._foreach_add_(counts, 1.0)
    return [float(count) for count in counts]


def _corrections(steps: list[float], decay: float) -> tuple[list[float], list[float]]:
    """1 - decay^n and 1 - decay^(n+1) of each parameter."""
    return [1 - decay**n for n in steps], [1 - decay ** (n + 1) for n in steps]


def _decay(params: list[Tensor], group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
