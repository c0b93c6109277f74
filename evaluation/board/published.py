"""Tables of the numbers that papers report. They form a separate section without ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pixlat.evaluation.board.columns import Cell, Column
from pixlat.evaluation.board.styles import ABSENT
from pixlat.evaluation.records.published import PublishedRow
from pixlat.evaluation.records.record import Record

PUBLISHED_NOTE = (
    "As the papers print them. Each paper has its own reference statistics, label law and selection, "
    "so these rows have no ranks and stand in no table with measured ones; gaps below about 0.15 FID between papers "
    "are within what protocols differ by. A question mark: not seen in the source."
)


def from_record(record: Record) -> PublishedRow:
    """A record of kind `published` as a row of this table."""
    source = record["source"]
    metrics = {name: str(entry["value"]) for name, entry in record["metrics"].items()}
    return metrics | {
        "system": record["name"],
        "resolution": str(record["data"]["resolution"]),
        "space": record["system"]["space"].replace("_", " "),
        "source": source["title"],
        "source_table": source["table"] or "",
        "status": source["status"],
        "unverified_fields": ";".join(source["unverified_fields"]),
        "note": record["notes"],
    }


def published_tables(rows: Sequence[PublishedRow]) -> list[tuple[str, list[PublishedRow]]]:
    """(resolution, its rows) in ascending resolution."""
    resolutions = sorted(
        {row["resolution"] for row in rows},
        key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0, text),
    )
    return [(resolution, [row for row in rows if row["resolution"] == resolution]) for resolution in resolutions]


def published_columns(rows: Sequence[PublishedRow]) -> list[Column[PublishedRow]]:
    """The columns that are not empty for at least one row."""
    return [column for column in COLUMNS if any(column.read(row).text != ABSENT for row in rows)]


def _field(name: str) -> Callable[[PublishedRow], Cell]:
    """Reads a field of a row. Numbers are sorted as numbers; `?` marks a value that we did not see in the source."""

    def read(row: PublishedRow) -> Cell:
        text = row.get(name) or ""
        if text in ("", "?"):
            return Cell()
        doubt = " ?" if name in row.get("unverified_fields", "").split(";") else ""
        try:
            return Cell(text + doubt, float(text))
        except ValueError:
            return Cell(text + doubt, text)

    return read


def _macs(row: PublishedRow) -> Cell:
    """The printed cost of a forward pass. The cell names the unit unless it is GMAC."""
    cell, unit = _field("gflops_per_forward_paper")(row), row.get("flop_unit") or ""
    return (
        cell if cell.text == ABSENT or unit == "GMAC" else Cell(f"{cell.text} ({unit or 'unit unknown'})", cell.value)
    )


COLUMNS: list[Column[PublishedRow]] = [
    Column("system", "system", _field("system"), essential=True),
    Column("space", "space", _field("space")),
    Column("epochs", "epochs", _field("epochs")),
    Column("params", "params", _field("params_gen_M"), "M", essential=True, hint="the generator"),
    Column("decoder", "decoder", _field("params_decoder_M"), "M"),
    Column("nfe", "NFE", _field("nfe"), hint="as the source counts them"),
    Column("macs", "GMACs/forward", _macs, hint="papers: Gflops; as printed, decoder excluded"),
    Column("guidance", "guidance", _field("guidance"), essential=True),
    Column("fid", "FID", _field("fid"), better="lower", essential=True),
    Column("is", "IS", _field("is"), better="higher", essential=True),
    Column("sfid", "sFID", _field("sfid"), better="lower"),
    Column("precision", "precision", _field("precision"), better="higher"),
    Column("recall", "recall", _field("recall"), better="higher"),
    Column("fd_dinov2", "FD-DINOv2", _field("fd_dinov2"), better="lower"),
    Column("labels", "labels", _field("label_protocol")),
    Column("evaluator", "evaluator", _field("evaluator_protocol")),
    Column("source", "source", _field("source"), essential=True),
    Column("table", "table", _field("source_table"), essential=True),
    Column("status", "status", _field("status"), essential=True),
    Column("note", "note", _field("note")),
]
