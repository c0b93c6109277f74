"""Training curves: loss, learning rate and speed over the images seen. Functions import matplotlib when they draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixlat.common.errors import UserError
from pixlat.common.pictures.grids import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_DRAWN = {"images", "step", "seconds"}
PANEL_TITLES = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "images_per_s": "images per second",
}
FROM_ZERO = (PANEL_TITLES["lr"], PANEL_TITLES["images_per_s"])


def training_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the rows of a metrics.jsonl over the images seen.

    All losses share one panel; every other quantity has its own panel, with one line per phase.
    """
    if not rows:
        raise UserError(
            f"{path}: there are no metrics to draw. metrics.jsonl gets its first line after train.log_images images."
        )
    from matplotlib.figure import Figure

    panels = _panels(rows)
    columns = min(2, len(panels))
    figure = Figure(figsize=(5.5 * columns, 3.2 * -(-len(panels) // columns)), dpi=120, layout="constrained")
    for number, (title, names) in enumerate(panels.items()):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, number + 1)
        _draw_panel(axes, title, names, rows)
        _draw_x_axis(axes, [row["images"] for row in rows])
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Draws a matplotlib figure into a PNG file; after an interruption no partial file remains under this name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    save_png(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)


def _panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Panel title -> the keys drawn in it.

    "generator/adv_loss" is a loss of the phase "generator". Losses come first, learning rate and speed last.
    """
    quantities = dict.fromkeys(
        name for row in rows for name, value in row.items() if name not in NOT_DRAWN and isinstance(value, int | float)
    )
    panels: dict[str, list[str]] = {"loss": []}
    for name in sorted(quantities, key=lambda name: name in ("lr", "images_per_s")):
        quantity = name.rpartition("/")[2]
        quantity = "loss" if "loss" in quantity else quantity
        panels.setdefault(PANEL_TITLES.get(quantity, quantity), []).append(name)
    return {title: names for title, names in panels.items() if names}


def _draw_panel(axes: Axes, title: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws one line per key: for noisy quantities a pale line and their running mean over it.

    Learning rate and speed are not smoothed, and their axis starts at zero.
    """
    exact = title in FROM_ZERO
    for number, name in enumerate(names):
        points = np.array(
            [(row["images"], row[name]) for row in rows if name in row and math.isfinite(row[name])], dtype=float
        ).reshape(-1, 2)
        smooth = not exact and len(points) >= 20
        if smooth:
            axes.plot(*points.T, color=f"C{number}", alpha=0.3, linewidth=1)
        values = _running_mean(points[:, 1], len(points) // 20) if smooth else points[:, 1]
        axes.plot(
            points[:, 0],
            values,
            color=f"C{number}",
            marker="o" if len(points) == 1 else None,
            linewidth=1.8,
            label=name,
        )
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("images seen", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False)
    values = np.array([row[name] for row in rows for name in names if name in row and math.isfinite(row[name])])
    if exact:
        axes.set_ylim(bottom=0, top=1.1 * values.max(initial=0) or 1)
    elif values.min(initial=np.inf) > 0 and values.max(initial=0) > 10 * values.min(initial=np.inf):
        axes.set_yscale("log")


def _draw_x_axis(axes: Axes, images: Sequence[int]) -> None:
    """Makes the axis logarithmic for long runs, because most changes happen early."""
    from matplotlib.ticker import EngFormatter

    if images[0] > 0 and images[-1] > 100 * images[0]:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _running_mean(values: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """The mean (N,) of each value and its neighbours up to `reach` away.

    Near the start, where curves are steep, it averages over fewer neighbours.
    """
    position = np.arange(len(values))
    reaches = np.minimum(position, reach)
    first, last = position - reaches, np.minimum(position + reaches + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[last] - sums[first]) / (last - first)
