"""The pair of optimizers that pMF trains with: Muon for matrices, Adam with Nesterov's momentum for everything else.

Both use Nesterov's look-ahead and correct the bias of their averages for it.
With g the gradient, b the decay and n the number of steps, counted from 1, the direction u is

    m <- b m + (1 - b) g,        u = b m / (1 - b^(n+1)) + (1 - b) g / (1 - b^n).

A parameter's step count is a scalar on the CPU, so the corrections need no host sync.

Several processes divide Muon's matrix products among themselves. Otherwise every process would compute all of them:

    full parameters (DDP)        Each process orthogonalises its share of the matrices.
                                 One all_gather sends the results to all processes.
    sharded parameters (FSDP2)   One all_to_all collects the parts of each matrix in one process;
                                 a second one sends the parts of the results back.

All processes therefore apply bit-identical updates. These differ by rounding from the updates of a single process,
because the batches of matrices are composed differently.
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
# numbers orthogonalised in one batch; keeps the working memory at a few times 64 MB for networks of any size
MAX_STACKED = 2**24
MAX_GATHERED = 2**28  # numbers that one all_gather returns: 1 GB in float32


def newton_schulz(matrices: Tensor, eps: float = 1e-8, bf16: bool = False) -> Tensor:
    """The approximate orthogonal factor of each matrix of a stack (N, R, C).

    Keeps the singular vectors and brings the singular values between about 0.7 and 1.2: five steps of the quintic
    iteration X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X with A = X X^T, from X scaled to Frobenius norm 1.
    Singular values below about 1e-3 of the norm end lower; zero stays zero.

    bf16: rounds the factors of each product to bfloat16 and sums in float32, as the TPUs of the reference do.
        The result is then bfloat16; otherwise everything has the precision of `matrices`.
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
    """One step of the iteration. It uses the rounded X and A also in the linear terms, on purpose.

    All terms of the polynomial then have the same input, and a step multiplies the rounding errors by f'(1) = -0.7.
    With exact X and A in the linear terms, only the products would carry the error,
    and a step would multiply it by b + c = -2.7 for X and by 2 c = 4.1 for A.
    """
    a, b, c = NEWTON_SCHULZ
    rounded = x.bfloat16()
    gram = _product(rounded, rounded.mT).bfloat16()
    polynomial = _product(gram, gram).mul_(c).add_(gram, alpha=b).bfloat16()
    return _product(polynomial, rounded).add_(rounded, alpha=a)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The products (N, R, C) of two stacks of bfloat16 matrices, summed and returned in float32.

    On devices other than CUDA this converts the factors to float32. Products of bfloat16 numbers are exact there,
    so the result is the same, at the speed of float32.
    """
    if a.is_cuda and hasattr(torch.ops.aten.bmm, "dtype"):  # from torch 2.8 on
        return torch.bmm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def newton_schulz_macs(matrices: int, rows: int, columns: int) -> int:
    """Multiply-accumulates of `newton_schulz` for a stack of shape (matrices, rows, columns)."""
    short, long = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * matrices * (2 * short**2 * long + short**3)


# -- how processes divide the matrices ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Team:
    """The processes that divide the matrices among themselves, and this process's rank among them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> Team:
        """FSDP2: the processes that hold parts of the first parameter. DDP: all processes."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        group = params[0].device_mesh.get_group() if isinstance(params[0], DTensor) else None
        return cls(dist.get_rank(group), dist.get_world_size(group), group)


@lru_cache(maxsize=16)
def deal(costs: tuple[int, ...], processes: int) -> list[list[int]]:
    """Assigns matrices with these costs to processes; returns the positions of each process's matrices.

    Takes the most expensive matrix first and gives each to the process that has the least work so far.
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for position in sorted(range(len(costs)), key=lambda position: -costs[position]):
        least = loads.index(min(loads))
        hands[least].append(position)
        loads[least] += costs[position]
    return hands


def rounds(hands: Sequence[Sequence[int]], sizes: Sequence[int], limit: int) -> Iterator[list[list[int]]]:
    """Splits each process's list of matrices (`hands`, from `deal`) into parts that are handled one after another,
    so that no process holds much more than `limit` numbers at once. sizes: the numbers in each matrix.

    A turn takes the next matrix of every process; these have about the same size.
    All processes have the same number of turns in a part.
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

    With `split` = k in a group, each parameter is k matrices stacked along dim 0 (a fused q, k, v has 3). Muon then
    orthogonalises each of the k alone, and `rows` is the number of rows of one.
    Matrices of the same shape are orthogonalised in one batch. `bf16` is the option of `newton_schulz`.
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
        """One step. All processes call it together, and the same parameters must have gradients in all of them."""
        for group in self.param_groups:
            if params := _with_gradient(group):
                self._advance(params, group)
                team = Team.of(params)
                self._step_together(params, group, team) if team.size > 1 else self._step_alone(params, group)

    def _advance(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Counts the step and updates the averages of the gradients; under FSDP2, this process's parts of them."""
        averages = _entries(self, params, "momentum")
        _count(self, params)
        torch._foreach_lerp_(_local_parts(averages), _local_parts(_gradients(params)), 1 - group["momentum"])

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """The direction u of each parameter; under FSDP2, this process's part of it."""
        if not params:
            return []
        momentum = group["momentum"]
        now, ahead = _corrections([float(self.state[p]["step"]) for p in params], momentum)
        directions = torch._foreach_mul(_local_parts(_entries(self, params, "momentum")), [momentum / c for c in ahead])
        torch._foreach_add_(
            directions, torch._foreach_mul(_local_parts(_gradients(params)), [(1 - momentum) / c for c in now])
        )
        return list(directions)

    def _step_alone(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for alike in _batches(params):
            updates = _orthogonal(self._directions(alike, group), group)
            _decay(alike, group)
            torch._foreach_add_(alike, updates, alpha=_factor(alike[0], group))

    def _step_together(self, params: list[Tensor], group: dict[str, Any], team: Team) -> None:
        """Each process orthogonalises its share of the matrices, and all processes apply all updates."""
        exchange = self._by_all_to_all if isinstance(params[0], DTensor) else self._by_all_gather
        hands = deal(tuple(newton_schulz_macs(*_stack_shape(p, group)) for p in params), team.size)
        for part in rounds(hands, [p.numel() for p in params], min(MAX_STACKED, MAX_GATHERED // team.size)):
            taken = [[params[position] for position in hand] for hand in part]
            matrices = [p for hand in taken for p in hand]
            for p, update in zip(matrices, exchange(taken, group, team), strict=True):
                (local,) = _local_parts([p])
                _decay([local], group)
                local.add_(update.view_as(local).to(local.dtype), alpha=_factor(p, group))

    def _by_all_gather(self, taken: list[list[Tensor]], group: dict[str, Any], team: Team) -> Iterator[Tensor]:
        """Yields the flattened updates of the matrices of all processes, in order.

        Under DDP each process has full gradients, so the processes exchange only results.
        """
        updates = _orthogonal(self._directions(taken[team.rank], group), group)
        sizes = [[p.numel() for p in hand] for hand in taken]
        length = max(map(sum, sizes))
        filler = taken[0][0].new_zeros(length - sum(sizes[team.rank]), dtype=_result_type(group))
        own_numbers = torch.cat([*(update.flatten() for update in updates), filler])
        gathered = own_numbers.new_empty(team.size * length)
        dist.all_gather_into_tensor(gathered, own_numbers, group=team.group)
        for row, numbers in zip(gathered.view(team.size, length), sizes, strict=True):
            yield from row[: sum(numbers)].split(numbers)

    def _by_all_to_all(self, taken: list[list[Tensor]], group: dict[str, Any], team: Team) -> Iterator[Tensor]:
        """Yields the flattened updates of the rows that this process holds, for the matrices of all processes in order.

        A process holds full matrices only of its own share.
        """
        own, matrices = taken[team.rank], [p for hand in taken for p in hand]
        # numbers in a process's part of each matrix; shorter parts are padded with rows of zeros
        sizes = [[-(-p.shape[0] // team.size) * p.shape[1] for p in hand] for hand in taken]
        numbers = [sum(hand) for hand in sizes]
        own_counts = [numbers[team.rank]] * team.size
        parts = [
            _with_rows(u, -(-p.shape[0] // team.size)).flatten()
            for p, u in zip(matrices, self._directions(matrices, group), strict=True)
        ]
        received = _all_to_all(torch.cat(parts), numbers, own_counts, team).view(team.size, -1 if own else 0)
        columns = received.split(sizes[team.rank], dim=1)
        full = [column.reshape(-1, p.shape[1])[: p.shape[0]] for p, column in zip(own, columns, strict=True)]
        padded = [
            _with_rows(u, -(-len(u) // team.size) * team.size).view(team.size, -1) for u in _orthogonal(full, group)
        ]
        results = torch.cat([*padded, received.new_empty(team.size, 0, dtype=_result_type(group))], dim=1)
        returned = _all_to_all(results.flatten(), own_counts, numbers, team)
        for p, part in zip(matrices, returned.split([size for hand in sizes for size in hand]), strict=True):
            yield part[: _local_parts([p])[0].numel()]


def _orthogonal(directions: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The orthogonal factor of each matrix, or of each of its `split` parts. Batches matrices of the same shape."""
    places: dict[torch.Size, list[int]] = defaultdict(list)
    for place, direction in enumerate(directions):
        places[direction.shape].append(place)
    results: dict[int, Tensor] = {}
    for shape, alike in places.items():
        _, rows, columns = _stack_shape(directions[alike[0]], group)
        stack = torch.cat([directions[place].reshape(-1, rows, columns) for place in alike])
        orthogonal = newton_schulz(stack, group["eps"], group["bf16"])
        results |= zip(alike, orthogonal.reshape(len(alike), *shape).unbind(), strict=True)
    return [results[place] for place in range(len(directions))]


def _stack_shape(matrix: Tensor, group: dict[str, Any]) -> tuple[int, int, int]:
    """(number of matrices stacked in this parameter, rows of each, columns of each)."""
    split: int = group["split"]
    return split, matrix.shape[0] // split, matrix.shape[1]


def _factor(matrix: Tensor, group: dict[str, Any]) -> float:
    """The factor -lr sqrt(max(1, rows / columns)) with which an orthogonal factor is added to the parameter."""
    _, rows, columns = _stack_shape(matrix, group)
    return float(-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def _result_type(group: dict[str, Any]) -> torch.dtype:
    return torch.bfloat16 if group["bf16"] else group["params"][0].dtype


def _local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of each sharded tensor; a full tensor as it is."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """The matrix, padded below with zeros to `rows` rows."""
    padded = matrix.new_zeros(rows, matrix.shape[1])
    padded[: len(matrix)] = matrix
    return padded


def _all_to_all(numbers: Tensor, sent: list[int], received: list[int], team: Team) -> Tensor:
    """Exchanges numbers with all processes and returns those that this process receives.

    sent, received: how many numbers this process sends to each process, and receives from each.
    """
    arrived = numbers.new_empty(sum(received))
    dist.all_to_all_single(arrived, numbers, received, sent, group=team.group)
    return arrived


class NesterovAdam(Optimizer):
    """p <- p - lr (u / (sqrt(v / (1 - b2^n)) + eps) + weight_decay p) with v the average of g^2.

    It differs from torch's NAdam, which changes its momentum by a schedule.
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
    """Groups parameters of the same shape, device and dtype, with at most MAX_STACKED numbers in a group.

    A larger parameter is a group alone.
    """
    alike: dict[Any, list[Tensor]] = defaultdict(list)
    for p in params:
        alike[p.shape, p.device, p.dtype].append(p)
    for same in alike.values():
        size = max(1, MAX_STACKED // same[0].numel())
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _entries(optimizer: Optimizer, params: list[Tensor], name: str) -> list[Tensor]:
    """The state tensor `name` of each parameter, in the parameter's shape. Creates it with zeros if it is missing."""
    for p in params:
        if name not in optimizer.state[p]:
            optimizer.state[p][name] = torch.zeros_like(p)
    return [optimizer.state[p][name] for p in params]


def _count(optimizer: Optimizer, params: list[Tensor]) -> list[float]:
    """Adds 1 to the step counts of the parameters and returns them; the first step is 1."""
    counts = [optimizer.state[p].setdefault("step", torch.zeros((), device="cpu")) for p in params]
    torch._foreach_add_(counts, 1.0)
    return [float(count) for count in counts]


def _corrections(steps: list[float], decay: float) -> tuple[list[float], list[float]]:
    """1 - decay^n and 1 - decay^(n+1) of each parameter."""
    return [1 - decay**n for n in steps], [1 - decay ** (n + 1) for n in steps]


def _decay(params: list[Tensor], group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
