"""Sorts records into tables. Imports no torch.

Each protocol hash has a section. Within it guided and unguided rows have separate tables, each ranked by one metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pixlat.common.errors import UserError
from pixlat.evaluation.board.entries import Entry, entries_of
from pixlat.evaluation.board.notes import (
    budget_notes,
    floor_at,
    floor_note,
    identity_notes,
    judges_note,
    uncounted_note,
)
from pixlat.evaluation.board.ranks import Ranking, range_text, ranking
from pixlat.evaluation.board.standing import NOT_KNOWN, contact_text, reason_not_ranked
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.records.claims import ClaimRecord, read_claims
from pixlat.evaluation.records.curve import CURVE, CurvePoint, read_curve
from pixlat.evaluation.records.record import RESULT, Record, read_record

HEADINGS = ("Unguided", "Guided", "Guidance not known", "Reconstruction")
# the first of these metrics that a table has ranks it; for all of them lower is better
PRIMARY = ("fid", "fd_dinov2", "fd_ratio", "fd_embedded", "fd", "rfid", "rfd_embedded")
BEST_NOTE = "Bold: no ranked row is significantly better."
REAL_IMAGES = "held-out real images"


@dataclass(frozen=True)
class Records:
    """All records below a folder."""

    rows: list[Record]
    left_out: list[str]  # one sentence for each damaged or invalid record, with its path
    folders: dict[str, Path] = field(default_factory=dict)  # row_id -> the folder with the record's pictures and logs
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)  # row_id -> its scores during training
    # the checked claims of papers, with their folders
    claims: list[tuple[ClaimRecord, Path]] = field(default_factory=list)

    @cached_property
    def sections(self) -> list[Section]:
        """The tables of the records. Kept, because comparing all pairs of many entries takes time."""
        return sections(self.rows)


@dataclass(frozen=True)
class Group:
    """The entries of one table: the ranked ones, best first, then the others, also best first."""

    heading: str
    primary: str
    ranked: list[Entry]
    unranked: list[tuple[Entry, str]]  # with the reason

    @cached_property
    def entries(self) -> list[Entry]:
        return [*self.ranked, *(entry for entry, _ in self.unranked)]

    @cached_property
    def ranking(self) -> Ranking:
        return ranking(self.ranked, self.primary)

    @cached_property
    def rank_texts(self) -> list[str]:
        """The range of ranks of every entry, "-" without one."""
        return [*map(range_text, self.ranking.ranges), *["-"] * len(self.unranked)]

    @cached_property
    def leaders(self) -> set[int]:
        """The places of the entries than which no ranked one is better; never of untrained networks."""
        leading = {i for i, (first, _) in enumerate(self.ranking.ranges) if first == 1}
        return {i for i in leading if not self.ranked[i].untrained} if len(self.ranked) > 1 else set()

    @cached_property
    def real(self) -> Entry | None:
        """Held-out real images in the place of generated ones, as far as the records hold their values."""
        return next((found for entry in self.entries if (found := real_images(entry.row, self.primary))), None)

    @property
    def notes(self) -> list[str]:
        """What the marks mean, and what the ranks rest on."""
        unknown = sum(contact_text(entry.row) == NOT_KNOWN for entry in self.ranked)
        note = f"Of {unknown} of {len(self.ranked)} ranked rows it is not known which judges they have met."
        marks = [BEST_NOTE] if len(self.ranked) > 1 else []
        return marks + self.ranking.notes + ([note] if unknown else [])


@dataclass(frozen=True)
class Section:
    """All rows of one protocol."""

    protocol_hash: str | None
    rows: list[Record]

    @property
    def name(self) -> str:
        """The protocol's name with its hash."""
        protocol = self.rows[0]["protocol"]
        return protocol_name(protocol) if protocol else self.protocol_hash or "not evaluated"

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of HEADINGS that have rows: unguided, guided, guidance not known, reconstructions."""
        return [
            group(chosen, heading)
            for heading in HEADINGS
            if (chosen := [row for row in self.rows if heading_of(row) == heading])
        ]

    @property
    def notes(self) -> list[str]:
        """Notes for readers who compare rows.

        They say what the score means, the score of real images, whether rows differ in training cost, which networks
        no cost includes, and how records became rows.
        """
        protocol = self.rows[0]["protocol"]
        hidden = sum(entry.hidden for group in self.groups for entry in group.entries)
        return [
            note
            for note in (
                judges_note(protocol, primary_of(self.rows)) if protocol else "",
                floor_note(self.rows[0], primary_of(self.rows)),
                *budget_notes(self.rows),
                uncounted_note(self.rows),
                *identity_notes(self.rows, hidden),
            )
            if note
        ]


def read_records(runs: Path, pattern: str = RESULT) -> Records:
    """Every record below `runs` with its curve. It skips hidden folders and copies of a record."""
    records = Records([], [], {}, {})
    for path in sorted(runs.rglob(pattern)):
        if any(part.startswith(".") for part in path.relative_to(runs).parts):
            continue
        try:
            record = read_record(path)
            if record["row_id"] in records.folders:
                continue
            records.rows.append(record)
            records.folders[record["row_id"]] = path.parent
            records.curves[record["row_id"]] = read_curve(path.parent / CURVE)
        except UserError as error:  # leaves out a damaged record, or only the curve if just that is damaged
            records.left_out.append(str(error))
    records.claims.extend(read_claims(runs, records.left_out))
    return records


def sections(rows: Sequence[Record]) -> list[Section]:
    """The measured rows by protocol: the protocol with most rows first, rows without an evaluation last."""
    by_hash: dict[str | None, list[Record]] = defaultdict(list)
    for row in rows:
        if row["kind"] != "published":
            by_hash[row["protocol_hash"]].append(row)
    unsorted = [section(chosen) for chosen in by_hash.values()]
    return sorted(unsorted, key=lambda part: (part.protocol_hash is None, -len(part.rows), part.name))


def section(rows: Sequence[Record]) -> Section:
    """The section of one protocol. Raises ValueError for rows of several protocols: they cannot be ranked together."""
    hashes = {row["protocol_hash"] for row in rows}
    if len(hashes) != 1:
        raise ValueError("one table, one protocol: " + ", ".join(sorted(map(str, hashes))))
    return Section(hashes.pop(), list(rows))


def group(rows: Sequence[Record], heading: str) -> Group:
    """Sorts the entries of one protocol's rows by their score, those with equal scores by name.

    An entry that has met a judge, or that mostly copies training images, is not ranked.
    """
    primary = primary_of(rows)

    def key(entry: Entry) -> tuple[bool, float, str]:
        metric = entry.metric(primary)
        return not metric, metric.get("value", 0.0), entry.row["name"]

    entries = [(entry, reason_not_ranked(entry, primary)) for entry in sorted(entries_of(rows), key=key)]
    ranked = [entry for entry, reason in entries if not reason]
    return Group(heading, primary, ranked, [(entry, reason) for entry, reason in entries if reason])


def primary_of(rows: Sequence[Record]) -> str:
    """The metric that ranks these rows."""
    return next((name for name in PRIMARY if any(name in row["metrics"] for row in rows)), "fd_embedded")


def real_images(row: Record, primary: str) -> Entry | None:
    """Held-out real images as an entry, from the values that a record holds; None if it holds none.

    Earlier records hold the floor of the distance, which is converted to the number of generated images.
    """
    metrics, real, judges = row["metrics"], row.get("real"), []
    if real is not None:
        found, judges = real["metrics"], real["judges"]
    else:
        floor, ranked = metrics.get("fd_floor"), metrics.get(primary)
        found = {"class_accuracy": metrics["class_accuracy_real"]} if "class_accuracy_real" in metrics else {}
        if floor and ranked and floor.get("value_bc") is not None:
            found |= {primary: {**floor, "value": floor_at(floor, ranked["n"]), "n": ranked["n"]}}
    system = {"method": "", "variant": None, "size": None, "space": "", "sampler": None}
    return Entry(({"name": REAL_IMAGES, "system": system, "metrics": found, "judges": judges},)) if found else None


def heading_of(row: Record) -> str:
    """The entry of HEADINGS for a row. Any kind of guidance counts as guided."""
    if row["protocol"] and row["protocol"]["samples"]["label_law"] == "reconstruction":
        return "Reconstruction"
    if "sampling" not in row:
        return "Guidance not known"
    return "Unguided" if row["sampling"]["guidance"] == "none" else "Guided"
