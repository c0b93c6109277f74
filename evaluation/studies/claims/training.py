"""Training and drawing that claims share: the suite's optimizers, schedules and seeds around a loss,
without run folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pixlat.common.config.schema import TrainConfig
from pixlat.common.seeds import seed_step
from pixlat.common.training.optim import build_optimizers, learning_rate, set_learning_rate
from pixlat.evaluation.studies.claims.framework import Estimate
from pixlat.methods.base import Method, ParamGroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def fit(
    method: Method,
    loss: Callable[[int], Tensor],
    settings: TrainConfig,
    seed: int,
    watch: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Trains all of the method's parameters with one Adam and returns the loss of every step.

    loss: from the step, which seeds its draws. watch: called with every step before it begins,
    and may look at the method.
    """
    method.train()
    optimizers, losses = (
        build_optimizers([ParamGroup([p for p in method.parameters() if p.requires_grad])], settings),
        [],
    )
    for step in range(settings.images // settings.batch):
        watch(step)
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


def line(
    axes: Axes, places: Sequence[float], values: Sequence[Estimate], color: int, label: str, style: str = "o-"
) -> None:
    """Estimates with their standard errors, in the palette's colour of this number."""
    axes.errorbar(
        places,
        [each.value for each in values],
        yerr=[each.se for each in values],
        fmt=style,
        capsize=3,
        color=f"C{color}",
        label=label,
    )


def bars(
    axes: Axes, names: Sequence[str], values: Sequence[Estimate], title: str, colors: Sequence[str] | str = "C0"
) -> None:
    """One bar an estimate, with its standard error and its number above it."""
    places = range(len(names))
    drawn = axes.bar(
        places, [each.value for each in values], yerr=[each.se for each in values], capsize=3, color=colors
    )
    axes.bar_label(
        drawn,
        [f"{each.value:,.0f}" if each.value >= 1000 else f"{each.value:.3g}" for each in values],
        padding=2,
        fontsize=7,
    )
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
