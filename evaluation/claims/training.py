"""Training and drawing that claims share: the suite's optimizers, schedules and seeds around a loss, without run folders."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from common.config import TrainConfig
from common.optim import build_optimizers, learning_rate, set_learning_rate
from common.seeds import seed_step
from methods.base import Method, ParamGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fit(method: Method, loss: Callable[[int], Tensor], settings: TrainConfig, seed: int) -> list[float]:
    """Trains all of the method's parameters with one Adam and returns the loss of every step. `loss`: from the step, which seeds its draws."""
    method.train()
    optimizers, losses = build_optimizers([ParamGroup([p for p in method.parameters() if p.requires_grad])], settings), []
    for step in range(settings.images // settings.batch):
        seed_step(seed, step, 0)
        value = loss(step)
        value.backward()
        for optimizer in optimizers:
            set_learning_rate(optimizer, learning_rate(settings, step * settings.batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(value.item())
    method.eval()
    return losses


def panels(rows: int, columns: int, size: tuple[float, float] = (3.0, 3.0)) -> tuple[Figure, list[list[Axes]]]:
    """An empty figure and its axes; matplotlib is imported here, with the first drawing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]
