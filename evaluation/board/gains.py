"""Compares configurations with the first one, by paired differences, from the records of finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from pixlat.common.errors import UserError
from pixlat.evaluation.board.columns import GIGA
from pixlat.evaluation.board.entries import Entry, configurations, told_apart
from pixlat.evaluation.board.groups import PRIMARY
from pixlat.evaluation.board.notes import PETA, budget_notes, earlier_stages, training_macs
from pixlat.evaluation.board.standing import contact_text, met_in_ranking, share_of_copies
from pixlat.evaluation.board.styles import METRICS, metric_style
from pixlat.evaluation.board.text import pipe_table, printable
from pixlat.evaluation.metrics.spread import (
    OF_REAL_IMAGES,
    Difference,
    check_same_measurement,
    over_trainings,
    paired_differences,
)
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.records.record import Record

ONE_SEED = (
    "One training seed: the interval covers sampling only, and another training may differ by more. "
    "Train with seed=0,1,2 to measure that."
)
UNNAMED = (
    "Some records do not name their settings (they were written by an earlier version). Their runs count as trainings "
    "of one configuration if method, size, training length and sampling are the same."
)
NO_VERDICT = (
    "No verdict (-): the two have not met the same ranking judges in the same roles, "
    "or one of them mostly copies training images."
)


def entries(records: Sequence[Record]) -> dict[str, Entry]:
    """The runs of each configuration under its name, in the order in which configurations first appear.

    Raises UserError for two runs with the same configuration and training seed, and for fewer than two configurations.
    """
    found = [Entry(tuple(sorted(rows, key=_seed))) for rows in configurations(records)]
    named = dict(zip(told_apart(found, [entry.method for entry in found]), found, strict=True))
    for name, entry in named.items():
        for first, second in zip(entry.rows, entry.rows[1:], strict=False):
            if _seed(first) == _seed(second):
                raise UserError(
                    f"{first['name']} and {second['name']} are both {name} with training seed {_seed(first)}. "
                    "Give one of them."
                )
    if len(named) < 2:
        raise UserError(
            "two methods or two settings of one method are needed to compare, "
            f"but the records are all of {', '.join(named) or 'none'}."
        )
    return named


def _seed(record: Record) -> int:
    return int(record["seeds"]["train"])


def gains(entry: Entry, baseline: Entry) -> list[Difference]:
    """Entry minus baseline over their common training seeds.

    With several seeds in every metric that all records have, with one in every metric with recorded jackknife values.
    Raises UserError for records of different protocols, and for entries without a common training seed.
    """
    seeds = sorted(entry.by_seed.keys() & baseline.by_seed.keys())
    if not seeds:
        raise UserError(
            f"{entry.rows[0]['name']} was trained with seeds {sorted(entry.by_seed)}, "
            f"the baseline with {sorted(baseline.by_seed)}: they have no seed in common."
        )
    pairs = [(entry.by_seed[seed], baseline.by_seed[seed]) for seed in seeds]
    if len(pairs) == 1:
        return paired_differences(*pairs[0])
    for pair in pairs:
        check_same_measurement(*pair)
    metrics = [name for name in pairs[0][0]["metrics"] if name not in OF_REAL_IMAGES]
    common = [name for name in metrics if all(name in record["metrics"] for pair in pairs for record in pair)]
    return [over_trainings(name, pairs) for name in common]


def table(named: Mapping[str, Entry]) -> str:
    """One table for each metric: every entry's score and its difference from the first. Then costs, contact, notes."""
    (baseline, first), *others = named.items()
    by_name = {name: {gain.metric: gain for gain in gains(entry, first)} for name, entry in others}
    metrics = sorted({metric for of_entry in by_name.values() for metric in of_entry}, key=_place)
    parts = [
        (
            f"{protocol_name(first.row['protocol'])}; a difference below 0 is a gain where lower is better (↓). "
            "Intervals of 95 % (Student's t) of differences between equal training seeds."
        )
    ]
    headers = ["", "score", f"minus {baseline}", "95 % interval", "seeds", "verdict"]
    for metric in metrics:
        style = metric_style(metric)
        arrow = {"lower": " ↓", "higher": " ↑"}.get(style.better or "", "")
        rows = [
            [printable(name), _score(entry, metric), *_gain_cells(by_name.get(name, {}).get(metric), entry, first)]
            for name, entry in named.items()
        ]
        parts.append(f"{style.label}{arrow}\n{pipe_table(rows, headers, 'simple')}")
    return "\n\n".join([*parts, cost_table(named), *notes(named, by_name)])


def _place(metric: str) -> tuple[int, str]:
    """The ranking metric first, then in the order of METRICS, then the others by name."""
    order = [*PRIMARY, *METRICS]
    return (order.index(metric) if metric in order else len(order), metric)


def _score(entry: Entry, metric: str) -> str:
    found = entry.metric(metric)
    return metric_style(metric).text(found["value"], found.get("se")) if found else ""


def _gain_cells(gain: Difference | None, entry: Entry, baseline: Entry) -> list[str]:
    if gain is None:
        return ["", "", "", ""]
    style = metric_style(gain.metric)
    low, high = (style.text(gain.value_bc + side * gain.margin, sign="+") for side in (-1, 1))
    difference = style.text(gain.value_bc, gain.se, sign="+")
    return [difference, f"{low} to {high}", str(gain.seeds), verdict(gain) if comparable(entry, baseline) else "-"]


def verdict(gain: Difference) -> str:
    """Better or worse than the baseline if the 95 % interval excludes zero, else open.

    Metrics that collapse improves, and those without a better direction, are only higher or lower.
    """
    style = metric_style(gain.metric)
    if not gain.separated:
        return "open"
    lower = gain.value_bc < 0
    if style.better is None or not style.praised:
        return "lower" if lower else "higher"
    return "better" if lower == (style.better == "lower") else "worse"


def comparable(entry: Entry, baseline: Entry) -> bool:
    """Whether both have met the same ranking judges in the same roles, and neither mostly copies training images."""
    copied = any(share_of_copies(run) for each in (entry, baseline) for run in each.rows)
    return met_in_ranking(entry.row) == met_in_ranking(baseline.row) and not copied


def cost_table(named: Mapping[str, Entry]) -> str:
    """The costs of each entry and the judges that it has met."""
    headers = ["", "training seeds", "images", "training (PMACs)", "sampling (GMACs/image)", "judges met"]
    rows = [[printable(name), *_costs(entry)] for name, entry in named.items()]
    return pipe_table(rows, headers, "simple")


def _costs(entry: Entry) -> list[str]:
    images = sorted({run["train"]["images_seen"] for run in entry.rows})
    sampling = entry.row.get("compute", {}).get("macs_per_image")
    return [
        ", ".join(map(str, entry.by_seed)),
        ", ".join(f"{n:,}" for n in images),
        training_text(entry),
        "" if sampling is None else f"{sampling / GIGA:.4g}",
        printable(contact_text(entry.row)),
    ]


def training_text(entry: Entry) -> str:
    """The PMACs of one training with its earlier stages in parentheses; empty if a part is not known."""
    known = [macs for run in entry.rows if (macs := training_macs(run)) is not None]
    if len(known) < len(entry.rows):
        return ""
    stages = [f"{stage['method']} {stage['macs_total'] / PETA:.4g}" for stage in earlier_stages(entry.row)]
    return f"{fmean(known) / PETA:.4g}" + (f" (of it {', '.join(stages)})" if stages else "")


def notes(named: Mapping[str, Entry], by_name: Mapping[str, Mapping[str, Difference]]) -> list[str]:
    """Warnings about runs that cannot be compared directly."""
    runs = [run for entry in named.values() for run in entry.rows]
    warnings, batches = budget_notes(runs), sorted({run["train"]["batch"] for run in runs})
    first, *others = named.values()
    if len(batches) > 1:
        warnings.append(f"The runs differ in their batch: {', '.join(map(str, batches))} images a step.")
    if any(gain.seeds == 1 for found in by_name.values() for gain in found.values()):
        warnings.append(ONE_SEED)
    if any("config" not in run for run in runs):
        warnings.append(UNNAMED)
    if not all(comparable(entry, first) for entry in others):
        warnings.append(NO_VERDICT)
    return warnings
