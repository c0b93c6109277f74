"""The columns of a table: how to read each quantity from an entry, its unit, its format, and which direction is better.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pixlat.evaluation.board.entries import Entry, differing, settings_of
from pixlat.evaluation.board.groups import Group
from pixlat.evaluation.board.notes import PETA, training_macs
from pixlat.evaluation.board.standing import contact_text, judge_name
from pixlat.evaluation.board.styles import ABSENT, METRICS, Better, metric_style
from pixlat.evaluation.metrics.spread import OF_REAL_IMAGES

NOTHING: dict[str, Any] = {"metrics": {}}
MEGA, GIGA = 1e6, 1e9
JUDGED = "fd_ratio"  # the metric of which tables show each judge's own value
SEPARATED = 2.0  # two values differ if their difference is larger than this many of its standard errors

ARROWS: dict[Better, str] = {"lower": " ↓", "higher": " ↑", None: ""}
Shown = TypeVar("Shown")  # what a line of the table shows: an Entry, or a published row


@dataclass(frozen=True)
class Cell:
    """The text of a cell, the value by which the column is sorted, and the standard error of the value."""

    text: str = ABSENT
    value: float | str | None = None
    error: float | None = None


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """One quantity of a line."""

    key: str
    label: str
    read: Callable[[Shown], Cell]
    unit: str = ""
    better: Better = None
    essential: bool = False  # whether the README, LaTeX tables and narrow screens show it
    hint: str = ""
    marked: bool = False  # whether the best cells are marked; never where collapse or copying wins

    @property
    def header(self) -> str:
        return self.label + (f" ({self.unit})" if self.unit else "") + ARROWS[self.better]


def columns_of(group: Group) -> list[Column[Entry]]:
    """The columns that are not empty for at least one entry."""
    columns = [
        *IDENTITY, *score_columns(group.primary), *standing_columns(group), *setting_columns(group.entries), SEEDS,
        *COST, *other_metrics(group), *judge_columns(group), *PROVENANCE,
    ]  # fmt: skip
    return [column for column in columns if any(column.read(entry).text != ABSENT for entry in group.entries)]


def marks(group: Group, columns: Sequence[Column[Entry]]) -> list[set[int]]:
    """For each column the places of the entries to mark: trained ones that are ranked.

    In the column that ranks they are those than which no entry is better.
    """
    eligible = {i for i, entry in enumerate(group.ranked) if not entry.untrained}
    return [
        group.leaders
        if column.key == group.primary
        else best(
            [column.read(entry) if i in eligible else Cell() for i, entry in enumerate(group.entries)], column.better
        )
        if column.marked
        else set()
        for column in columns
    ]


def setting_columns(entries: Sequence[Entry]) -> list[Column[Entry]]:
    """A column for each setting that differs. It is essential if it tells apart entries of one method and size."""
    by_method: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_method[entry.method].append(entry)
    telling = {name for same in by_method.values() for name in differing([entry.row for entry in same])}
    names = [
        name for name in differing([entry.row for entry in entries]) if name != "sampling seeds" or name in telling
    ]
    return [Column(f"setting:{name}", name, _setting(name), essential=name in telling) for name in names]


def _setting(name: str) -> Callable[[Entry], Cell]:
    def read(entry: Entry) -> Cell:
        told = settings_of(entry.row)
        text = told.get(name, "preset's" if "." in name and "preset" in told else ABSENT)
        try:
            return Cell(text, float(text))
        except ValueError:
            return _text(text)

    return read


def score_columns(primary: str) -> list[Column[Entry]]:
    """The ranking metric, its values in each training, its bias-corrected value and its spread over sampling seeds."""
    style = metric_style(primary)
    hint = f"{style.hint}; " if style.hint else ""
    return [
        Column(
            primary, style.label, _metric(primary), style.unit, style.better, True,
            f"{hint}ranks the table; ± is one standard error, over trainings where there are several",
        ),
        Column("each_seed", "each training", _each_training(primary), hint="the score of every training seed"),
        Column(
            "bias_corrected", "bias-corrected", _metric(primary, "value_bc"),
            hint="the score for infinitely many images, by the grouped jackknife",
        ),
        Column(
            "sd_seeds", "sd of seeds", _metric(primary, "sd_seeds"),
            hint="standard deviation of the score over sampling seeds",
        ),
    ]  # fmt: skip


def _each_training(primary: str) -> Callable[[Entry], Cell]:
    style = metric_style(primary)

    def read(entry: Entry) -> Cell:
        values = [row["metrics"][primary]["value"] for row in entry.rows if primary in row["metrics"]]
        return _text(", ".join(map(style.text, values))) if len(values) > 1 else Cell()

    return read


def standing_columns(group: Group) -> list[Column[Entry]]:
    """The judges that each entry has met, and why it is not ranked."""
    reasons = {id(entry): reason for entry, reason in group.unranked}
    return [
        Column(
            "contact", "judges met", _contact, essential=True,
            hint="networks that judge here and took part in training or sampling the row, found by their digests",
        ),
        Column(
            "reason", "not ranked because", lambda entry: _text(reasons.get(id(entry), ABSENT)), essential=True,
            hint="why the row has no rank",
        ),
    ]  # fmt: skip


def _contact(entry: Entry) -> Cell:
    return _text(contact_text(entry.row)) if entry.row.get("protocol") else Cell()


def other_metrics(group: Group) -> list[Column[Entry]]:
    """Columns of all other metrics of the rows. Metrics without a style come last."""
    names = {name for entry in group.entries for name in entry.row["metrics"]} - {group.primary, *OF_REAL_IMAGES}
    known = [name for name in METRICS if name in names]
    return [metric_column(name) for name in [*known, *sorted(names - set(known))]]


def metric_column(name: str) -> Column[Entry]:
    """The column with value and standard error of a metric."""
    style = metric_style(name)
    return Column(
        name, style.label, _metric(name), style.unit, style.better, style.essential, style.hint, style.marked
    )  # fmt: skip


def judge_columns(group: Group) -> list[Column[Entry]]:
    """The score that each judge gives alone."""
    ids = dict.fromkeys(judge["id"] for entry in group.entries for judge in entry.row.get("judges", ()))
    style = metric_style(JUDGED)
    return [
        Column(f"judge:{judge}", f"{style.label} of {judge_name(judge)}", _judged(judge), "", "lower", hint=style.hint)
        for judge in ids
    ]


def _judged(judge: str) -> Callable[[Entry], Cell]:
    def read(entry: Entry) -> Cell:
        found = next((each for each in entry.row.get("judges", ()) if each["id"] == judge), NOTHING)
        return metric_cell(found["metrics"].get(JUDGED, {}), JUDGED)

    return read


def _metric(name: str, field: str = "value") -> Callable[[Entry], Cell]:
    return lambda entry: metric_cell(entry.metric(name), name, field)


def metric_cell(found: Mapping[str, Any], name: str, field: str = "value") -> Cell:
    """The cell of a field of a metric; only the value has an error."""
    style, value = metric_style(name), found.get(field)
    if value is None:
        return Cell()
    error = found.get("se") if field == "value" else None
    return Cell(style.text(value, error), value * style.scale, None if error is None else error * style.scale)


def _number(section: str, field: str, unit: float = 1.0, form: str = ".4g") -> Callable[[Entry], Cell]:
    return lambda entry: number_cell(entry.row.get(section, {}).get(field), unit, form)


def number_cell(value: float | None, unit: float = 1.0, form: str = ".4g") -> Cell:
    """The cell of a quantity in a unit; empty for None."""
    return Cell() if value is None else Cell(format(value / unit, form), value / unit)


def _nonzero(section: str, field: str, unit: float, form: str) -> Callable[[Entry], Cell]:
    return lambda entry: number_cell(entry.row.get(section, {}).get(field) or None, unit, form)


def _text(text: str) -> Cell:
    return Cell(text, text) if text not in ("", ABSENT) else Cell()


def _borrowed(entry: Entry) -> Cell:
    return number_cell(sum(part["params"] for part in entry.row.get("pretrained_components", [])) or None, MEGA, ".2f")


def _tried(entry: Entry) -> Cell:
    return number_cell(entry.tried if entry.tried > 1 else None)


def _seeds(entry: Entry) -> Cell:
    seeds = sorted(entry.by_seed)
    return (
        Cell(", ".join(map(str, seeds)), float(len(seeds)) if len(seeds) > 1 else float(seeds[0])) if seeds else Cell()
    )


def _date(entry: Entry) -> Cell:
    return _text(max(row.get("created_utc", "") for row in entry.rows)[:10])


IDENTITY: list[Column[Entry]] = [
    Column("run", "run", lambda entry: _text(entry.row["name"]), essential=True),
    Column("method", "method", lambda entry: _text(entry.method), essential=True),
    Column(
        "space", "space", lambda entry: _text(entry.row["system"]["space"].replace("_", " ")),
        hint="where the model denoises: pixels or latents",
    ),
]  # fmt: skip
SEEDS = Column("seed", "training seeds", _seeds, essential=True, hint="trainings of which the row is the mean")
COST: list[Column[Entry]] = [
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
    Column(
        "train_macs", "training", lambda entry: number_cell(training_macs(entry.row), PETA), "PMACs", essential=True,
        hint="of one training: forward and backward, frozen networks and all stages trained here included",
    ),
    Column("images_seen", "images seen", _number("train", "images_seen", form=",.0f")),
    Column(
        "images_s", "speed", _number("speed", "images_per_s"),
        "images/s", hint="sampling, on one device of the machine of the record",
    ),
]  # fmt: skip
PROVENANCE: list[Column[Entry]] = [
    Column("tried", "settings tried", _tried, hint="how many settings the shown one was chosen from"),
    Column(
        "about",
        "how they were chosen",
        lambda entry: _text(entry.row.get("selection", {}).get("about", "")),
        hint="what the authors of the preset tried",
    ),
    Column("date", "date", _date),
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
