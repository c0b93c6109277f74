"""Renders the leaderboard as one HTML page that needs no network.

The page shows tables, plots of quality against cost, curves, sample grids, protocols and published rows. The contents
of records stand in the page as JSON in a script element that the browser does not execute; `assets/page.js` inserts
them as text. A content security policy with the hashes of the page's scripts forbids any other script and any request.
Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from pixlat.common.errors import UserError
from pixlat.evaluation.board.attachments import attachment, grid_of, grid_uri, losses_of
from pixlat.evaluation.board.columns import Cell, Column, Shown, columns_of, marks
from pixlat.evaluation.board.entries import Entry
from pixlat.evaluation.board.groups import Group, Records, Section
from pixlat.evaluation.board.judges import judge_tables
from pixlat.evaluation.board.matched import curves_of, matched_tables
from pixlat.evaluation.board.published import PUBLISHED_NOTE, published_columns, published_tables
from pixlat.evaluation.board.styles import ABSENT, metric_style
from pixlat.evaluation.records.claims import PICTURE_FILE, ClaimRecord
from pixlat.evaluation.records.curve import CurvePoint
from pixlat.evaluation.records.published import PublishedRow
from pixlat.evaluation.records.record import Record

ASSETS = Path(__file__).with_name("assets")
SCRIPTS = ("vendor/d3.min.js", "vendor/plot.umd.min.js", "vendor/dataTables.min.js", "page.js")
COSTS = ("macs_image", "params", "train_macs")  # columns for the horizontal axes of the plots
DRAWN = 1000  # largest number of points in a plot: the Pareto front first, then the best others
CURVES = 8  # largest number of runs in a plot of training curves, the number of colours
GRIDS = 12  # largest number of sample grids of a data set


def to_html(records: Records, published: Sequence[PublishedRow] = ()) -> str:
    """The HTML of the page."""
    scripts = [asset(name) for name in SCRIPTS]
    return Template(asset("page.html")).substitute(
        policy=" ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
        style=asset("page.css"),
        data=script_json(page_data(records, published)),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


@cache
def asset(name: str) -> str:
    """The text of a file in `assets`."""
    return (ASSETS / name).read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON in which &, < and > are escaped, so that it cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def page_data(records: Records, published: Sequence[PublishedRow]) -> dict[str, Any]:
    """All data of the page."""
    left_out = list(records.left_out)
    all_sections = records.sections
    return {
        "rows": sum(len(section.rows) for section in all_sections),
        "sections": [section_data(section, records, left_out) for section in all_sections],
        "grids": grids_data(all_sections, records.folders, left_out),
        "claims": [claim_data(record, folder, left_out) for record, folder in records.claims],
        "published": [
            {"resolution": resolution, "table": published_table(rows)}
            for resolution, rows in published_tables(published)
        ],
        "publishedNote": PUBLISHED_NOTE,
        "leftOut": left_out,
    }


def section_data(section: Section, records: Records, left_out: list[str]) -> dict[str, Any]:
    """The data of one protocol's section."""
    first = section.rows[0]
    title = f"{first['data']['name']}, {first['data']['resolution']} px"
    if first["protocol"]:
        title += f", {first['protocol']['samples']['n']:,} images"
    return {
        "id": f"protocol-{section.protocol_hash}",
        "title": title if first["protocol"] else "Not evaluated",
        "name": section.name,
        "notes": section.notes,
        "protocol": json.dumps(first["protocol"], indent=2, ensure_ascii=False) if first["protocol"] else None,
        "groups": [group_data(group, records, left_out) for group in section.groups],
    }


def group_data(group: Group, records: Records, left_out: list[str]) -> dict[str, Any]:
    """The data of a group: its ranked table, its plots, and its tables at equal cost."""
    columns = columns_of(group)
    return {
        "heading": group.heading,
        "score": metric_style(group.primary).label,
        "scoreColumn": group.primary,
        "table": ranked_table(group, columns),
        "notes": [note.replace("Bold", "Shaded") for note in group.notes],
        "methods": [entry.row["system"]["method"] for entry in group.entries],
        "ranked": len(group.ranked),
        "floor": group.real.metric(group.primary).get("value") if group.real else None,
        "plots": [plot for key in COSTS if (plot := plot_data(group, columns, key))],
        "judges": [vars(table) for table in judge_tables(group)],
        "matched": [vars(table) for table in matched_tables(group, records.curves)],
        "scores": score_curves(group, records.curves),
        "losses": loss_curves(group, records.folders, left_out),
    }


# -- tables ------------------------------------------------------------------------------------------------------------


def ranked_table(group: Group, columns: Sequence[Column[Entry]]) -> dict[str, Any]:
    """A table whose first column is the range of ranks, and whose foot is the line of held-out real images."""
    rank: Column[Entry] = Column("rank", "", lambda entry: Cell(), essential=True, hint="range of ranks")
    table = table_data(columns, group.entries)
    table["columns"].insert(0, column_data(rank))
    table["best"] = [[], *(sorted(chosen) for chosen in marks(group, columns))]
    for place, (cells, text) in enumerate(zip(table["rows"], group.rank_texts, strict=True)):
        cells.insert(0, [text, place] if place < len(group.ranked) else [ABSENT])
    if group.real:
        table["foot"] = ["", *(column.read(group.real).text for column in columns)]
    return table


def published_table(rows: Sequence[PublishedRow]) -> dict[str, Any]:
    """A table without ranks and without best values."""
    return table_data(published_columns(rows), rows)


def table_data(columns: Sequence[Column[Shown]], lines: Sequence[Shown]) -> dict[str, Any]:
    """A table's columns, its rows of cells [text, value, standard error], and no marked row in any column."""
    cells = [[column.read(line) for line in lines] for column in columns]
    return {
        "columns": [column_data(column) for column in columns],
        "rows": [[cell_data(cell) for cell in line] for line in zip(*cells, strict=True)] if columns else [],
        "best": [[] for _ in columns],
    }


def column_data(column: Column[Any]) -> dict[str, Any]:
    """The data of a column's header."""
    return {name: getattr(column, name) for name in ("key", "label", "unit", "better", "essential", "hint")}


def cell_data(cell: Cell) -> list[Any]:
    """[text], [text, value] or [text, value, error]; a value equal to the text is left out: the page sorts by text."""
    values = [value for value in (None if cell.value == cell.text else cell.value, cell.error) if value is not None]
    return [cell.text, *values]


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_data(group: Group, columns: Sequence[Column[Entry]], key: str) -> dict[str, Any] | None:
    """The plot of quality against one cost: the rows to draw and those on the Pareto front, which are ranked.

    None if fewer than two rows have a positive cost and score.
    """
    column = next((column for column in columns if column.key == key), None)
    if column is None:
        return None
    points = [
        (i, column.read(entry).value, entry.metric(group.primary).get("value", 0.0))
        for i, entry in enumerate(group.entries)
    ]
    positive = [
        (i, float(cost), score) for i, cost, score in points if isinstance(cost, float | int) and cost > 0 and score > 0
    ]
    front = pareto_front([point for point in positive if point[0] < len(group.ranked)])
    drawn = list(dict.fromkeys([*front, *(i for i, _, _ in positive)]))[:DRAWN]
    return {"column": key, "front": front, "drawn": sorted(drawn), "of": len(positive)} if len(positive) > 1 else None


def pareto_front(points: Sequence[tuple[int, float, float]]) -> list[int]:
    """The indices of the points (index, cost, score) on the Pareto front, sorted by cost. Lower is better for both."""
    front, lowest = [], float("inf")
    for index, _, score in sorted(points, key=lambda point: (point[1], point[2])):
        if score < lowest:
            front.append(index)
            lowest = score
    return front


def score_curves(group: Group, measured: Mapping[str, Sequence[CurvePoint]]) -> list[dict[str, Any]]:
    """Curves of the score over images seen and over training MACs, for runs that were evaluated during training."""
    plots = []
    for axis, label in (("images", "images seen"), ("train_macs", "training MACs")):
        curves = [curve for curve in curves_of(group, axis, measured) if len(curve.points) > 1][:CURVES]  # type: ignore[arg-type]
        lines = [
            {"run": curve.name, "points": [[point.cost, point.value, point.error] for point in curve.points]}
            for curve in curves
        ]
        if lines:
            plots.append({"label": label, "lines": lines})
    return plots


def loss_curves(group: Group, folders: Mapping[str, Path], left_out: list[str]) -> list[dict[str, Any]]:
    """The losses of the best runs over the images seen."""
    lines = []
    for row in [row for entry in group.entries for row in entry.rows][:CURVES]:
        try:
            curves = losses_of(row, folders[row["row_id"]]) if row["row_id"] in folders else {}
        except UserError as error:
            left_out.append(str(error))
            continue
        lines += [
            {"run": row["name"] + (f", {name.rpartition('/')[0]}" if "/" in name else ""), "points": points}
            for name, points in curves.items()
        ]
    return lines


# -- sample grids ------------------------------------------------------------------------------------------------------


def grids_data(parts: Sequence[Section], folders: Mapping[str, Path], left_out: list[str]) -> list[dict[str, Any]]:
    """For each data set, the sample grid of the best run of each method. All use the same noise and labels."""
    by_data: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    pairs = [(group, entry) for section in parts for group in section.groups for entry in group.entries]
    for group, entry in pairs:
        row = entry.rows[0]
        data, label = row["data"], f"{entry.method}, {group.heading.lower()}"
        figures = by_data.setdefault((data["name"], data["revision"], data["resolution"]), {})
        if label in figures or len(figures) >= GRIDS or row["row_id"] not in folders:
            continue
        try:
            grid = grid_of(row, folders[row["row_id"]])
        except UserError as error:
            left_out.append(str(error))
            continue
        if grid:
            figures[label] = figure_data(row, group, label, grid)
    return [
        {"title": f"{name}, {resolution} px", "figures": list(figures.values())}
        for (name, _, resolution), figures in by_data.items()
        if figures
    ]


def claim_data(record: ClaimRecord, folder: Path, left_out: list[str]) -> dict[str, Any]:
    """The data of a checked claim: the texts and tables of its record, and its picture."""
    picture = None
    try:
        path = attachment(folder, PICTURE_FILE)
        picture = grid_uri(path) if path else None
    except UserError as error:
        left_out.append(str(error))
    cells = [
        [each["text"], f"{each['value']:.4g}", f"{each['se']:.2g}" if each["n"] else ABSENT, each["verdict"]]
        for each in record["criteria"]
    ]
    return {
        **{name: record[name] for name in ("name", "verdict", "statement", "paper", "setting", "remarks")},
        "amended": record.get("amended", ""),
        "budget": ("quick run, " if record["quick"] else "")
        + (f"{len(record['seeds'])} seeds" if record["seeds"] else "nothing random"),
        "criteria": {"headers": ["criterion", "found", "standard error", "verdict"], "cells": cells},
        "table": {"headers": record["table"]["headers"], "cells": record["table"]["rows"]},
        "picture": picture,
    }


def figure_data(row: Record, group: Group, label: str, grid: tuple[str, int, int]) -> dict[str, Any]:
    """The data of a picture and its caption."""
    uri, width, height = grid
    style, metric = metric_style(group.primary), row["metrics"].get(group.primary)
    score = f"{style.label} {style.text(metric['value'])}" if metric else ""
    return {"src": uri, "width": width, "height": height, "method": label, "run": row["name"], "score": score}
