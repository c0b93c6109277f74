"""The pair of optimizers that pMF trains with: Muon for matrices, Adam with Nesterov's momentum for everything else.

Both correct the bias of their averages at the point where Nesterov's step looks:
with b the decay and n the number of steps, counted from 1,

    m <- b m + (1 - b) g,        u = b m / (1 - b^(n+1)) + (1 - b) g / (1 - b^n).

A parameter's step count is a scalar on the CPU, so that the corrections are known without waiting for a device.

Several processes divide Muon's matrix products among themselves,
because each product would otherwise be computed by every process:

    whole parameters (DDP)       each process orthogonalises its share of the matrices,
                                 one all_gather hands the results to all
    spread parameters (FSDP2)    the parts of a matrix travel to one process and its result's parts travel back,
                                 by two all_to_all

All processes therefore apply the same bits. They differ from a single process's by rounding,
because a batch of matrices holds others.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# numbers orthogonalised at once: bounds the working memory at a few times 64 MB whatever the network's size
MAX_STACKED = 2**24
MAX_GATHERED = 2**28  # numbers that one all_gather brings: 1 GB in float32


def newton_schulz(matrices: Tensor, eps: float = 1e-8, bf16: bool = False) -> Tensor:
    """The orthogonal factor of each matrix of a stack (N, R, C), approximately:
    singular values between about 0.7 and 1.2, directions kept.

    Five steps of the quintic iteration X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X with A = X X^T,
    from X scaled to Frobenius norm 1, in the precision given.
    Singular values below about 1e-3 of the norm are not lifted as far; zero stays zero.

    bf16: factors of products are rounded to bfloat16, sums are float32, as on the TPUs of the reference;
    the result is bfloat16.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + eps)
    for _ in range(NEWTON_SCHULZ_STEPS):
        x = _improved_in_bf16(x) if bf16 else _improved(x)
    x = x.mT if tall else x
    return x.bfloat16() if bf16 else x


def _improved(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    return torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)


def _improved_in_bf16(x: Tensor) -> Tensor:
    """The rounded X and A stand in the linear terms, too: as inputs of the same polynomial their rounding
    errors shrink by f'(1) = -0.7 a step.

    With the exact ones there, the products' share of the error alone would remain,
    which is multiplied by b + c = -2.7 for X and 2 c = 4.1 for A.
    """
    a, b, c = NEWTON_SCHULZ
    rounded = x.bfloat16()
    gram = _product(rounded, rounded.mT).bfloat16()
    polynomial = _product(gram, gram).mul_(c).add_(gram, alpha=b).bfloat16()
    return _product(polynomial, rounded).add_(rounded, alpha=a)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The products (N, R, C) of two stacks of bfloat16 matrices, added up and returned in float32.

    Elsewhere than on CUDA the factors become float32, in which products of bfloat16 numbers are exact:
    the same result at float32's speed.
    """
    if a.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # from torch 2.8 on
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def newton_schulz_macs(matrices: int, rows: int, columns: int) -> int:
    """Multiply-accumulates of `newton_schulz` for a stack of that shape."""
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * matrices * (2 * short**2 * long + short**3)


# -- who orthogonalises what -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Team:
    """The processes among which matrices are dealt out."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Team:
        """Those who hold parts of the first parameter, or all processes, which hold the same parameters."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        group = params[0].device_mesh.get_group() if isinstance(params[0], DTensor) else None
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


@lru_cache(maxsize=16)
def deal(costs: tuple[int, ...], processes: int) -> list[list[int]]:
    """For each process the positions of its matrices: the costliest matrix goes first,
    each to the process that has the least work so far.
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        least = loads.index(min(loads))
        hands[least].append(position)
        loads[least] += costs[position]
    return hands


def rounds(hands: Sequence[Sequence[int]], sizes: Sequence[int], limit: int) -> Iterator[list[list[int]]]:
    """The hands, part by part, so that no process holds much more than `limit` numbers at once;
    `sizes` are the matrices' numbers.

    Each part has the same number of turns for all processes. A turn takes every process's next matrix,
    and those are of about the same size.
    """
    part: list[list[int]] = [[] for _ in hands]
    numbers = 0
    for turn in zip_longest(*hands):
        largest = max(sizes[position] for position in turn if position is not None)
        if numbers and numbers + largest > limit:
            yield part
            part, numbers = [[] for _ in hands], 0
        for hand, position in zip(part, turn, strict=True):
            hand += [] if position is None else [position]
        numbers += largest
    if numbers:
        yield part


# -- the optimizers ----------------------------------------------------------------------------------------------------


class Muon(Optimizer):
    """p <- p - lr (sqrt(max(1, rows / columns)) NewtonSchulz(u) + weight_decay p), for matrices (rows, columns) only.

    With `split` = k in a group, each of its matrices is k matrices stacked along dim 0 (a fused q, k, v has 3),
    treated alone; rows then counts one of them. Matrices of the same shape are orthogonalised in one batch.
    `bf16` is the precision of `newton_schulz`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        split: int = 1,
        eps: float = 1e-8,
        bf16: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "split": split,
            "eps": eps,
            "bf16": bf16,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2 or p.shape[0] % group["split"]:
                    raise ValueError(
                        f"Muon takes matrices whose rows are a multiple of split={group['split']}, not {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no line search here
        """One step. Several processes take it together, and in all of them the same parameters must have gradients."""
        for group in self.param_groups:
            if params := _with_gradient(group):
                self._advance(params, group)
                team = Team.of(params)
                self._step_together(params, group, team) if team.size > 1 else self._step_alone(params, group)

    def _advance(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Counts the step and moves the averages of the gradients;
        a process that holds parts of the parameters moves its parts.
        """
        averages = _entries(self, params, "momentum")
        _count(self, params)
        torch._foreach_lerp_(_held(averages), _held(_gradients(params)), 1 - group["momentum"])

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """u of each parameter, or this process's part of it."""
        if not params:
            return []
        momentum = group["momentum"]
        now, ahead = _corrections([float(self.state[p]["step"]) for p in params], momentum)
        directions = torch._foreach_mul(_held(_entries(self, params, "momentum")), [momentum / c for c in ahead])
        torch._foreach_add_(
            directions, torch._foreach_mul(_held(_gradients(params)), [(1 - momentum) / c for c in now])
        )
        return list(directions)

    def _step_alone(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for alike in _batches(params):
            updates = _orthogonal(self._directions(alike, group), group)
            _decay(alike, group)
            torch._foreach_add_(alike, updates, alpha=_factor(alike[0], group))

    def _step_together(self, params: list[Tensor], group: dict[str, Any], team: Team) -> None:
        """Part by part: each process orthogonalises its own matrices, and all processes apply all updates."""
        exchange = self._by_all_to_all if isinstance(params[0], DTensor) else self._by_all_gather
        hands = deal(tuple(newton_schulz_macs(*_stack_shape(p, group)) for p in params), team.size)
        for part in rounds(hands, [p.numel() for p in params], min(MAX_STACKED, MAX_GATHERED // team.size)):
            taken = [[params[position] for position in hand] for hand in part]
            everyones = [p for hand in taken for p in hand]
            for p, update in zip(everyones, exchange(taken, group, team), strict=True):
                (held,) = _held([p])
                _decay([held], group)
                held.add_(update.view_as(held).to(held.dtype), alpha=_factor(p, group))

    def _by_all_gather(self, taken: list[list[Tensor]], group: dict[str, Any], team: Team) -> Iterator[Tensor]:
        """The flat updates of all processes' matrices, in order.

        Every process has whole gradients, so only results travel.
        """
        updates = _orthogonal(self._directions(taken[team.rank], group), group)
        sizes = [[p.numel() for p in hand] for hand in taken]
        length = max(map(sum, sizes))
        filler = taken[0][0].new_zeros(length - sum(sizes[team.rank]), dtype=_result_type(group))
        mine = torch.cat([*(update.flatten() for update in updates), filler])
        gathered = mine.new_empty(team.size * length)
        dist.all_gather_into_tensor(gathered, mine, group=team.group)
        for row, numbers in zip(gathered.view(team.size, length), sizes, strict=True):
            yield from row[: sum(numbers)].split(numbers)

    def _by_all_to_all(self, taken: list[list[Tensor]], group: dict[str, Any], team: Team) -> Iterator[Tensor]:
        """The flat updates of the rows that this process holds of all processes' matrices, in order.

        No process has more whole matrices than its own.
        """
        own, everyones = taken[team.rank], [p for hand in taken for p in hand]
        # of a part; shorter ones get rows of zeros
        sizes = [[-(-p.shape[0] // team.size) * p.shape[1] for p in hand] for hand in taken]
        numbers = [sum(hand) for hand in sizes]
        mine = [numbers[team.rank]] * team.size
        parts = [
            _with_rows(u, -(-p.shape[0] // team.size)).flatten()
            for p, u in zip(everyones, self._directions(everyones, group), strict=True)
        ]
        received = _all_to_all(torch.cat(parts), numbers, mine, team).view(team.size, -1 if own else 0)
        columns = received.split(sizes[team.rank], dim=1)
        whole = [column.reshape(-1, p.shape[1])[: p.shape[0]] for p, column in zip(own, columns, strict=True)]
        padded = [
            _with_rows(u, -(-len(u) // team.size) * team.size).view(team.size, -1) for u in _orthogonal(whole, group)
        ]
        results = torch.cat([*padded, received.new_empty(team.size, 0, dtype=_result_type(group))], dim=1)
        returned = _all_to_all(results.flatten(), mine, numbers, team)
        for p, part in zip(everyones, returned.split([size for hand in sizes for size in hand]), strict=True):
            yield part[: _held([p])[0].numel()]


def _orthogonal(directions: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The orthogonal factor of each matrix (or of each of its `split` parts), those of the same shape in one batch."""
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for place, direction in enumerate(directions):
        places[direction.shape].append(place)
    found: dict[int, Tensor] = {}
    for shape, alike in places.items():
        _, rows, columns = _stack_shape(directions[alike[0]], group)
        stack = torch.cat([directions[place].reshape(-1, rows, columns) for place in alike])
        orthogonal = newton_schulz(stack, group["eps"], group["bf16"])
        found |= zip(alike, orthogonal.reshape(len(alike), *shape).unbind(), strict=True)
    return [found[place] for place in range(len(directions))]


def _stack_shape(matrix: Tensor, group: dict[str, Any]) -> tuple[int, int, int]:
    """(matrices that are orthogonalised alone, their rows, their columns)."""
    split: int = group["split"]
    return split, matrix.shape[0] // split, matrix.shape[1]


def _factor(matrix: Tensor, group: dict[str, Any]) -> float:
    """What an orthogonal factor is multiplied by before it is added."""
    _, rows, columns = _stack_shape(matrix, group)
    return float(-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def _result_type(group: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if group["bf16"] else group["params"][0].dtype


def _held(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """The matrix with rows of zeros below."""
    padded = matrix.new_zeros(rows, matrix.shape[1])
    padded[: len(matrix)] = matrix
    return padded


def _all_to_all(numbers: Tensor, sent: list[int], received: list[int], team: Team) -> Tensor:
    """What the processes send to this one, which sends them its own numbers; counts by process."""
    arrived = numbers.new_empty(sum(received))
    dist.all_to_all_single(arrived, numbers, received, sent, group=team.group)
    return arrived


class NesterovAdam(Optimizer):
    """p <- p - lr (u / (sqrt(v / (1 - b2^n)) + eps) + weight_decay p) with v the average of g^2.

    Not torch's NAdam, which schedules its momentum.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
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
    """Parameters of the same shape, device and type together, at most MAX_STACKED numbers
    (or one parameter) at a time.
    """
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
