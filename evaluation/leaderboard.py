"""All records below a folder as tables: `python evaluation/leaderboard.py [--runs runs] [--out DIR]` writes leaderboard.md, .csv and .json.

One table per protocol hash: numbers of different protocols never meet. Guided and unguided rows stand apart. Imports no torch.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from common.errors import UserError
from common.files import write_whole
from evaluation.protocol import protocol_name
from evaluation.record import Record, RecordError, read_record, to_csv

RESULT = "result.json"
PRIMARY = ("fid", "fd_dinov2", "fd_embedded")  # the first of these that a record has ranks it
GIGA, PETA = 1e9, 1e15
ABSENT = "-"

EMBEDDED_NOTE = "Embedded extractor: compare only inside this project, same hash. Not comparable with Inception FID."


@dataclass(frozen=True)
class Records:
    """What was found below a folder."""

    rows: list[Record]
    left_out: list[str]  # one sentence for each record that is broken or invalid, with its path


def read_records(runs: Path) -> Records:
    """Every result.json below `runs`, hidden folders passed over. A copy of a record counts once."""
    rows: dict[str, Record] = {}
    left_out = []
    for path in sorted(runs.rglob(RESULT)):
        if any(part.startswith(".") for part in path.relative_to(runs).parts):
            continue
        try:
            record = read_record(path)
        except RecordError as error:
            left_out.append(str(error))
        else:
            rows.setdefault(record["row_id"], record)
    return Records(list(rows.values()), left_out)


def render(records: Records) -> dict[str, str]:
    """The contents of leaderboard.md, .csv and .json, by suffix."""
    return {
        "md": to_markdown(records),
        "csv": to_csv(records.rows),
        "json": json.dumps(records.rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }


def to_terminal(records: Records, protocol: str | None) -> str:
    """The ranking of one protocol in the columns that fit a terminal; leaderboard.md has them all."""
    rows = [row for row in records.rows if row["protocol_hash"] == protocol]
    if not rows:
        return ""
    primary = next((name for name in PRIMARY if any(name in row["metrics"] for row in rows)), PRIMARY[-1])
    shown = {"run", "params (M)", "NFE", "train PMACs", primary, "class acc.", "seed"}
    lines = [title(rows[0]), floor_note(rows[0])]
    for heading, guided in (("unguided", False), ("guided", True)):
        if chosen := [row for row in rows if is_guided(row) == guided]:
            lines.append(f"\n{heading}\n{table(chosen, shown, tablefmt='simple')}")
    return "\n".join(line for line in lines if line)


# -- Markdown -------------------------------------------------------------------------------------------------------------------


def to_markdown(records: Records) -> str:
    """The page: a section per protocol, then what was left out."""
    groups: dict[str | None, list[Record]] = defaultdict(list)
    for record in records.rows:
        groups[record["protocol_hash"]].append(record)
    sections = ["# Leaderboard"]
    sections += [protocol_section(groups[key]) for key in sorted(groups, key=lambda key: (key is None, key or ""))]
    if not records.rows:
        sections.append("No records.")
    if records.left_out:
        sections.append("\n".join(["## Left out", "", *(f"- {escape(reason)}" for reason in records.left_out)]))
    return "\n\n".join(sections) + "\n"


def protocol_section(rows: Sequence[Record]) -> str:
    """One protocol's tables. Records of several protocols are a ValueError: they must not be ranked together."""
    if len({row["protocol_hash"] for row in rows}) != 1:
        raise ValueError("one table, one protocol: " + ", ".join(sorted({str(row["protocol_hash"]) for row in rows})))
    first = rows[0]
    lines = [f"## {escape(title(first))}"]
    if first["protocol"] and not first["protocol"]["extractor"]["comparable_with_inception_fid"]:
        lines.append(EMBEDDED_NOTE)
    if floor := floor_note(first):
        lines.append(floor)
    for heading, guided in (("Unguided", False), ("Guided", True)):
        if chosen := [row for row in rows if is_guided(row) == guided]:
            lines += [f"### {heading}", table(chosen)]
    return "\n\n".join(lines)


def title(row: Record) -> str:
    """The name of a row's protocol."""
    if row["protocol"]:
        return protocol_name(row["protocol"])
    return row["protocol_hash"] or "not evaluated"


def is_guided(row: Record) -> bool:
    """Whether sampling used guidance of any kind."""
    return row.get("sampling", {}).get("guidance", "none") != "none"


def floor_note(row: Record) -> str:
    """What held-out real images reach, also carried to the number of generated images: FD(n) = FD(inf) + c / n."""
    floor, primary = row["metrics"].get("fd_floor"), primary_metric(row)
    if not floor or not primary:
        return ""
    n = row["metrics"][primary]["n"]
    note = f"Floor: {floor['n']} held-out real images in the place of generated ones reach {floor['value']:.2f}"
    if floor.get("value_bc") is not None and floor.get("se") is not None:
        at_n = floor["value_bc"] + (floor["value"] - floor["value_bc"]) * floor["n"] / n
        note += f" (bias-corrected {floor['value_bc']:.2f} ± {floor['se']:.2f}), which makes {at_n:.2f} for {n} images"
    real = row["metrics"].get("class_accuracy_real")
    return note + (f". Class accuracy of held-out real images: {real['value']:.3f}." if real else ".")


def primary_metric(row: Record) -> str | None:
    """The metric that ranks the row."""
    return next((name for name in PRIMARY if name in row["metrics"]), None)


def table(rows: Sequence[Record], shown: Collection[str] = (), tablefmt: str = "pipe") -> str:
    """A ranked table of the columns that are `shown` (default all); rows without the ranking metric come last and have no rank."""
    primary = next((name for name in PRIMARY if any(name in row["metrics"] for row in rows)), PRIMARY[-1])

    def key(row: Record) -> tuple[bool, float, str]:
        metric = row["metrics"].get(primary)
        return (metric is None, metric["value"] if metric else 0.0, row["name"])

    ordered = sorted(rows, key=key)
    columns = [column for column in table_columns(primary) if not shown or column[0] in shown]
    clean = escape if tablefmt == "pipe" else printable
    body = [[str(rank) if primary in row["metrics"] else ABSENT, *(clean(read(row)) for _, read in columns)] for rank, row in enumerate(ordered, start=1)]
    headers = ["rank", *(clean(name) for name, _ in columns)]
    return tabulate(body, headers, tablefmt=tablefmt, disable_numparse=True)


def table_columns(primary: str) -> list[tuple[str, Callable[[Record], str]]]:
    """Header and cell of each column after the rank. Cost is in MACs, which papers print as Gflops."""
    return [
        ("run", lambda row: row["name"]),
        ("method", lambda row: " ".join(part for part in (row["system"]["method"], row["system"]["variant"], row["system"]["size"]) if part)),
        ("params (M)", lambda row: _number(row, "params", "gen_total", 1e6, ".2f")),
        ("NFE", lambda row: _number(row, "sampling", "nfe_evals", 1, ".4g")),
        ("GMACs/image (papers: Gflops)", lambda row: _number(row, "compute", "macs_per_image", GIGA, ".4g")),
        ("train PMACs", lambda row: _number(row, "train", "macs_total", PETA, ".4g")),
        ("images/s", lambda row: _number(row, "speed", "images_per_s", 1, ".4g")),
        (primary, lambda row: _metric(row, primary, ".2f", error=True)),
        ("bias-corrected", lambda row: _metric(row, primary, ".2f", field="value_bc")),
        ("KID", lambda row: _metric(row, "kid", ".4g")),
        ("IS", lambda row: _metric(row, "is", ".1f")),
        ("P / R", lambda row: _metric(row, "precision", ".3f") + " / " + _metric(row, "recall", ".3f")),
        ("D / C", lambda row: _metric(row, "density", ".3f") + " / " + _metric(row, "coverage", ".3f")),
        ("class acc.", lambda row: _metric(row, "class_accuracy", ".3f")),
        ("seed", lambda row: str(row["seeds"]["train"]) if "seeds" in row else ABSENT),
        ("date", lambda row: row["created_utc"][:10]),
    ]


def _number(row: Record, section: str, field: str, unit: float, form: str) -> str:
    value = row.get(section, {}).get(field)
    return ABSENT if value is None else format(value / unit, form)


def _metric(row: Record, name: str, form: str, field: str = "value", error: bool = False) -> str:
    entry = row["metrics"].get(name, {})
    if entry.get(field) is None:
        return ABSENT
    text = format(entry[field], form)
    return f"{text} ± {entry['se']:{form}}" if error and entry.get("se") is not None else text


def printable(text: str) -> str:
    """Any string without what would move a terminal's cursor or break a line."""
    return "".join(character if character.isprintable() else " " for character in text)


def escape(text: str) -> str:
    """Any string as Markdown that shows it: no markup, no HTML, no line or cell break."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"[\\`*\[\]|~$]", r"\\\g<0>", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore within a word is no markup


# -- command --------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the three files and says so; broken records are named on stderr and do not stop the rest."""
    parser = argparse.ArgumentParser(description="Tables of all result.json records: leaderboard.md, leaderboard.csv, leaderboard.json.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of runs (default: runs)")
    parser.add_argument("--out", type=Path, help="where the files go (default: the folder of runs)")
    options = parser.parse_args(arguments)
    try:
        written = write(options.runs, options.out or options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in written))
    return 0


def write(runs: Path, out: Path) -> list[Path]:
    """Renders the records below `runs` into files in `out`, which is made if it is missing."""
    if not runs.is_dir():
        raise UserError(f"--runs={runs} is not a folder. Give the folder that holds the runs, by default ./runs.")
    records = read_records(runs)
    for reason in records.left_out:
        print(f"left out: {reason}", file=sys.stderr)
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [write_whole(out / f"leaderboard.{suffix}", text) for suffix, text in render(records).items()]
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}. Choose a writable folder with --out.") from error


if __name__ == "__main__":
    sys.exit(main())
