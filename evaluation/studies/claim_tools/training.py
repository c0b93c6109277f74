"""Training and drawing that claims share. `fit` uses the suite's optimizers, schedules and seeds but no run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pixlat.common.config.schema import TrainConfig
from pixlat.common.seeds import seed_step
from pixlat.common.training.optim import build_optimizers, learning_rate, set_learning_rate
from pixlat.evaluation.studies.claim_tools.framework import Estimate
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
    """Trains all trainable parameters of the method with one Adam optimizer and returns the loss of every step.

    loss: maps the step to the loss; the step seeds the random draws. watch: called before every step with the step;
    it may inspect the method.
    """
    method.train()
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    optimizers = build_optimizers([ParamGroup(parameters)], settings)
    losses = []
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
    """An empty figure and its axes, `size` inches each. Imports matplotlib only here, because the import is slow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def line(
    axes: Axes, places: Sequence[float], values: Sequence[Estimate], color: int, label: str, style: str = "o-"
) -> None:
    """Draws estimates with their standard errors, in colour number `color` of matplotlib's palette."""
    axes.errorbar(
        places,
        [estimate.value for estimate in values],
        yerr=[estimate.se for estimate in values],
        fmt=style,
        capsize=3,
        color=f"C{color}",
        label=label,
    )


def bars(
    axes: Axes, names: Sequence[str], values: Sequence[Estimate], title: str, colors: Sequence[str] | str = "C0"
) -> None:
    """Draws one bar for each estimate, with its standard error and with its value as text above it."""
    places, heights = range(len(names)), [estimate.value for estimate in values]
    drawn = axes.bar(places, heights, yerr=[estimate.se for estimate in values], capsize=3, color=colors)
    labels = [f"{height:,.0f}" if height >= 1000 else f"{height:.3g}" for height in heights]
    axes.bar_label(drawn, labels, padding=2, fontsize=7)
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
