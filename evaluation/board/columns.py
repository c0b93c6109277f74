"""The columns of a table: how to read each quantity from a record, its unit, its format, and which direction is better.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pixlat.evaluation.board.groups import PETA, Group, training_macs
from pixlat.evaluation.records.record import Record

ABSENT = "-"
MEGA, GIGA = 1e6, 1e9
SEPARATED = 2.0  # two values differ if their difference is larger than this many of its standard errors

Better = Literal["lower", "higher", None]
ARROWS: dict[Better, str] = {"lower": " ↓", "higher": " ↑", None: ""}


@dataclass(frozen=True)
class Cell:
    """The text of a cell, the value by which the column is sorted, and the standard error of the value."""

    text: str = ABSENT
    value: float | str | None = None
    error: float | None = None


@dataclass(frozen=True)
class Column:
    """One quantity of a record."""

    key: str
    label: str
    read: Callable[[Record], Cell]
    unit: str = ""
    better: Better = None
    essential: bool = False  # whether the README, LaTeX tables and narrow screens show it
    hint: str = ""

    @property
    def header(self) -> str:
        return self.label + (f" ({self.unit})" if self.unit else "") + ARROWS[self.better]


@dataclass(frozen=True)
class MetricStyle:
    """How to print a metric. `form` is its format; "" is for a metric without a typical size (0.1 to 10,000)."""

    label: str
    form: str
    better: Better
    scale: float = 1.0
    essential: bool = False
    unit: str = ""

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


METRICS = {
    "fid": MetricStyle("FID", ".2f", "lower"),
    "fd_dinov2": MetricStyle("FD-DINOv2", ".2f", "lower"),
    "fd_embedded": MetricStyle("fd_embedded", ".2f", "lower"),
    "rfid": MetricStyle("rFID", ".3f", "lower"),
    "rfd_embedded": MetricStyle("rfd_embedded", ".2f", "lower"),
    "sfid": MetricStyle("sFID", ".2f", "lower"),
    "kid": MetricStyle("KID", "", "lower", scale=1000, unit="x1000"),
    "mind": MetricStyle("MIND", ".4g", "lower"),
    "is": MetricStyle("IS", ".1f", "higher", essential=True),
    "precision": MetricStyle("precision", ".3f", "higher"),
    "recall": MetricStyle("recall", ".3f", "higher"),
    "density": MetricStyle("density", ".3f", "higher"),
    "coverage": MetricStyle("coverage", ".3f", "higher"),
    "class_accuracy": MetricStyle("class acc.", ".3f", "higher", essential=True),
    "psnr": MetricStyle("PSNR", ".2f", "higher", essential=True, unit="dB"),
    "ssim": MetricStyle("SSIM", ".3f", "higher"),
    "lpips": MetricStyle("LPIPS", ".3f", "lower", essential=True),
    "perceptual_embedded": MetricStyle("perceptual", ".3f", "lower"),
}
OF_REAL_IMAGES = ("fd_floor", "class_accuracy_real")  # equal for all rows of a table, so they stand in its notes


def columns_of(group: Group) -> list[Column]:
    """The columns that are not empty for at least one row."""
    columns = [*IDENTITY, *score_columns(group.primary), *COST, *other_metrics(group), *PROVENANCE]
    return [column for column in columns if any(column.read(row).text != ABSENT for row in group.rows)]


def score_columns(primary: str) -> list[Column]:
    """The ranking metric, its bias-corrected value and its spread over seeds."""
    style = metric_style(primary)
    return [
        Column(
            primary,
            style.label,
            _metric(primary),
            style.unit,
            style.better,
            True,
            "ranks the table; ± is one standard error",
        ),
        Column(
            "bias_corrected",
            "bias-corrected",
            _metric(primary, "value_bc"),
            hint="the score for infinitely many images, by the grouped jackknife",
        ),
        Column(
            "sd_seeds",
            "sd of seeds",
            _metric(primary, "sd_seeds"),
            hint="standard deviation of the score over sampling seeds",
        ),
    ]


def other_metrics(group: Group) -> list[Column]:
    """Columns of all other metrics of the rows. Metrics without a style come last."""
    names = {name for row in group.rows for name in row["metrics"]} - {group.primary, *OF_REAL_IMAGES}
    known = [name for name in METRICS if name in names]
    return [metric_column(name) for name in [*known, *sorted(names - set(known))]]


def metric_column(name: str) -> Column:
    """The column with value and standard error of a metric."""
    style = metric_style(name)
    return Column(name, style.label, _metric(name), style.unit, style.better, style.essential)


def metric_style(name: str) -> MetricStyle:
    """The style of a metric. A metric without a style is shown under its own name and without a better direction."""
    return METRICS.get(name, MetricStyle(name, ".4g", None))


def _metric(name: str, field: str = "value") -> Callable[[Record], Cell]:
    style = metric_style(name)

    def read(row: Record) -> Cell:
        entry = row["metrics"].get(name, {})
        if entry.get(field) is None:
            return Cell()
        value, error = entry[field], entry.get("se") if field == "value" else None
        return Cell(style.text(value, error), value * style.scale, None if error is None else error * style.scale)

    return read


def _number(section: str, field: str, unit: float = 1.0, form: str = ".4g") -> Callable[[Record], Cell]:
    return lambda row: number_cell(row.get(section, {}).get(field), unit, form)


def number_cell(value: float | None, unit: float = 1.0, form: str = ".4g") -> Cell:
    """The cell of a quantity in a unit; empty for None."""
    return Cell() if value is None else Cell(format(value / unit, form), value / unit)


def _nonzero(section: str, field: str, unit: float, form: str) -> Callable[[Record], Cell]:
    return lambda row: number_cell(row.get(section, {}).get(field) or None, unit, form)


def _method(row: Record) -> Cell:
    return _text(
        " ".join(part for part in (row["system"]["method"], row["system"]["variant"], row["system"]["size"]) if part)
    )


def _text(text: str) -> Cell:
    return Cell(text, text)


def _borrowed(row: Record) -> Cell:
    return number_cell(sum(part["params"] for part in row.get("pretrained_components", [])) or None, MEGA, ".2f")


def _tried(row: Record) -> Cell:
    tried = row.get("selection", {}).get("n_configs", 1)
    return number_cell(tried if tried > 1 else None)


def _seed(row: Record) -> Cell:
    return number_cell(row["seeds"]["train"], form=".0f") if "seeds" in row else Cell()


IDENTITY = [
    Column("run", "run", lambda row: _text(row["name"]), essential=True),
    Column("method", "method", _method, essential=True),
    Column(
        "space",
        "space",
        lambda row: _text(row["system"]["space"].replace("_", " ")),
        hint="where the model denoises: pixels or latents",
    ),
]
COST = [
    Column(
        "nfe", "NFE", _number("sampling", "nfe_evals"),
        essential=True, hint="executed velocity, score or one-step evaluations per image",
    ),
    Column("macs_image", "sampling", _number("compute", "macs_per_image", GIGA), "GMACs/image", essential=True,
           hint="multiply-accumulates of all executed forwards, guidance and decoder included; papers call them flops"),
    Column(
        "params", "params", _number("params", "gen_total", MEGA, ".2f"), "M",
        essential=True, hint="of the generator, without decoder and frozen teachers",
    ),
    Column(
        "decoder", "decoder", _nonzero("params", "decoder", MEGA, ".2f"), "M", hint="parameters from latents to pixels",
    ),
    Column("borrowed", "pre-trained parts", _borrowed, "M", hint="parameters of networks that somebody else trained"),
    Column("train_macs", "training", lambda row: number_cell(training_macs(row), PETA), "PMACs", essential=True,
           hint="forward and backward, frozen networks and all stages trained here included"),
    Column("images_seen", "images seen", lambda row: number_cell(row.get("train", {}).get("images_seen"), form=",.0f")),
    Column(
        "images_s", "speed", _number("speed", "images_per_s"),
        "images/s", hint="sampling, on one device of the machine of the record",
    ),
]  # fmt: skip
PROVENANCE = [
    Column("tried", "settings tried", _tried, hint="how many settings the shown one was chosen from"),
    Column("seed", "seed", _seed),
    Column("date", "date", lambda row: _text(row["created_utc"][:10])),
]


def best(cells: Sequence[Cell], better: Better) -> set[int]:
    """Positions of the best value and of all values within two standard errors of the difference from it."""
    numbers = {i: cell for i, cell in enumerate(cells) if isinstance(cell.value, float | int)}
    if not better or len(numbers) < 2:
        return set()
    sign = 1 if better == "lower" else -1
    top = min(numbers, key=lambda i: sign * numbers[i].value)  # type: ignore[operator]
    return {i for i, cell in numbers.items() if not _separated(cell, numbers[top])}


def _separated(cell: Cell, top: Cell) -> bool:
    assert isinstance(cell.value, float | int) and isinstance(top.value, float | int)
    error = math.hypot(cell.error, top.error) if cell.error is not None and top.error is not None else 0.0
    return abs(cell.value - top.value) > SEPARATED * error
