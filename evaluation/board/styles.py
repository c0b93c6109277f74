"""How to print each metric, which direction is better, and whether a table marks its best value. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ABSENT = "-"

Better = Literal["lower", "higher", None]


@dataclass(frozen=True)
class TextTable:
    """A table of texts with its title and a note."""

    title: str
    note: str
    headers: list[str]
    cells: list[list[str]]


@dataclass(frozen=True)
class MetricStyle:
    """How to print a metric. `form` is its format; "" is for a metric without a typical size (0.1 to 10,000)."""

    label: str
    form: str
    better: Better
    scale: float = 1.0
    essential: bool = False
    unit: str = ""
    hint: str = ""
    # Whether tables mark the best value. Only metrics that compare an image with its own original are marked, and the
    # metric that ranks: repeated images or copies of training images win the others (precision, density, IS, KID ...).
    marked: bool = False
    praised: bool = True  # False: a set of few repeated images can have the best value

    def text(self, value: float, error: float | None = None, sign: str = "") -> str:
        """The text of a record's value after scaling, with its standard error.

        Without a form, the value has three significant digits or, with an error, as many decimal places as the error
        with two significant digits. It is never in scientific notation.
        """
        value, error = value * self.scale, None if error is None else error * self.scale
        form, place = self.form, 0
        if not form:
            place = last_place(error, 2) if error else last_place(value, 3)
            form = f",.{max(place, 0)}f"
            value, error = round(value, place), None if error is None else round(error, place)
        return f"{value:{sign}{form}}" + ("" if error is None else f" ± {error:{form}}")


def last_place(value: float, digits: int) -> int:
    """The decimal place of the last of `digits` significant digits. For three digits: 2 for 1.234, -1 for 1234."""
    return digits - 1 - math.floor(math.log10(abs(value))) if value else 0


TIMES_REAL = "times as far from the real images as real images that nobody has seen"
METRICS = {
    "fid": MetricStyle("FID", ".2f", "lower"),
    "fd_dinov2": MetricStyle("FD-DINOv2", ".2f", "lower"),
    "fd_ratio": MetricStyle("fd_ratio", ".2f", "lower", hint=TIMES_REAL),
    "fd_embedded": MetricStyle("fd_embedded", ".2f", "lower"),
    "fd": MetricStyle("FD", "", "lower", hint="to the training images, in the judge's own units"),
    "rfid": MetricStyle("rFID", ".3f", "lower"),
    "rfd_embedded": MetricStyle("rfd_embedded", ".2f", "lower"),
    "fd_ratio_train": MetricStyle("fd, to training", ".2f", "lower", hint=f"fd_ratio, part: {TIMES_REAL}"),
    "fd_ratio_heldout": MetricStyle("fd, to held-out", ".2f", "lower", hint=f"fd_ratio, part: {TIMES_REAL}"),
    "fd_heldout": MetricStyle("FD held-out", "", "lower", hint="to the held-out images, in the judge's own units"),
    "sfid": MetricStyle("sFID", ".2f", "lower"),
    "kid": MetricStyle("KID", "", "lower", scale=1000, unit="x1000"),
    "kid_ratio": MetricStyle("kid_ratio", ".2f", "lower", hint=f"by the kernel distance: {TIMES_REAL}"),
    "kid_ratio_train": MetricStyle("kid, to training", ".2f", "lower", hint=f"kid_ratio, part: {TIMES_REAL}"),
    "kid_ratio_heldout": MetricStyle("kid, to held-out", ".2f", "lower", hint=f"kid_ratio, part: {TIMES_REAL}"),
    "kid_heldout": MetricStyle("KID held-out", "", "lower", scale=1000, unit="x1000"),
    "mind": MetricStyle("MIND", ".4g", "lower"),
    "memorisation": MetricStyle(
        "memorisation", ".3f", None, essential=True,
        hint="distance to the nearest training image, divided by that of unseen real images; below 1: nearer than they",
    ),
    "copies": MetricStyle(
        "copies", ".1f", None, scale=100, essential=True, unit="%",
        hint="images nearer to a training image than the nearest 5 % of unseen real images",
    ),
    "is": MetricStyle("IS", ".1f", "higher", praised=False),
    "precision": MetricStyle("precision", ".3f", "higher", praised=False),
    "recall": MetricStyle("recall", ".3f", "higher"),
    "density": MetricStyle("density", ".3f", "higher", praised=False),
    "coverage": MetricStyle("coverage", ".3f", "higher"),
    "class_accuracy": MetricStyle("class acc.", ".3f", "higher", essential=True),
    "psnr": MetricStyle("PSNR", ".2f", "higher", essential=True, unit="dB", marked=True),
    "ssim": MetricStyle("SSIM", ".3f", "higher", marked=True),
    "lpips": MetricStyle("LPIPS", ".3f", "lower", essential=True, marked=True),
    "perceptual_embedded": MetricStyle("perceptual", ".3f", "lower", marked=True),
}  # fmt: skip


def metric_style(name: str) -> MetricStyle:
    """The style of a metric. A metric without a style is shown under its own name and without a better direction."""
    return METRICS.get(name, MetricStyle(name, ".4g", None))
