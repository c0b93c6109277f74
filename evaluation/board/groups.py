"""Sorts records into tables. Imports no torch.

Each protocol hash has a section. Within it guided and unguided rows have separate tables, each ranked by one metric.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pixlat.common.errors import UserError
from pixlat.evaluation.protocols.identity import protocol_name
from pixlat.evaluation.records.claims import ClaimRecord, read_claims
from pixlat.evaluation.records.curve import CURVE, CurvePoint, read_curve
from pixlat.evaluation.records.record import RESULT, Record, read_record

HEADINGS = ("Unguided", "Guided", "Guidance not known", "Reconstruction")
# the first of these metrics that a table has ranks it; for all of them lower is better
PRIMARY = ("fid", "fd_dinov2", "fd_embedded", "rfid", "rfd_embedded")

PETA = 1e15
SAME = 0.01  # costs whose relative difference is smaller count as equal

EMBEDDED_NOTE = "Embedded extractor: compare only inside this project, same hash. Not comparable with Inception FID."


@dataclass(frozen=True)
class Records:
    """All records below a folder."""

    rows: list[Record]
    left_out: list[str]  # one sentence for each damaged or invalid record, with its path
    folders: dict[str, Path] = field(default_factory=dict)  # row_id -> the folder with the record's pictures and logs
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)  # row_id -> its scores during training
    # the checked claims of papers, with their folders
    claims: list[tuple[ClaimRecord, Path]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Rows that are ranked together, best first. Rows without the ranking metric come last and have no rank."""

    heading: str
    primary: str
    rows: list[Record]

    @cached_property
    def ranked(self) -> list[Record]:
        return [row for row in self.rows if self.primary in row["metrics"]]


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

        They say if the extractor is comparable with others, the score of real images, whether rows differ in training
        cost, and which networks no cost includes.
        """
        protocol = self.rows[0]["protocol"]
        embedded = bool(protocol) and not protocol["extractor"]["comparable_with_inception_fid"]
        return [
            note
            for note in (
                EMBEDDED_NOTE if embedded else "",
                floor_note(self.rows[0]),
                *budget_notes(self.rows),
                uncounted_note(self.rows),
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
    """Ranks rows of one protocol. Rows with equal scores are sorted by name."""
    primary = next((name for name in PRIMARY if any(name in row["metrics"] for row in rows)), "fd_embedded")

    def key(row: Record) -> tuple[bool, float, str]:
        metric = row["metrics"].get(primary)
        return (metric is None, metric["value"] if metric else 0.0, row["name"])

    return Group(heading, primary, sorted(rows, key=key))


def heading_of(row: Record) -> str:
    """The entry of HEADINGS for a row. Any kind of guidance counts as guided."""
    if row["protocol"] and row["protocol"]["samples"]["label_law"] == "reconstruction":
        return "Reconstruction"
    if "sampling" not in row:
        return "Guidance not known"
    return "Unguided" if row["sampling"]["guidance"] == "none" else "Guided"


def training_macs(row: Record) -> int | None:
    """The MACs of training, including earlier stages; None if a part of them is not known."""
    parts = [row.get("train", {}).get("macs_total"), *(parent.get("macs_total") for parent in row.get("parents", []))]
    return None if None in parts else sum(parts)


def budget_notes(rows: Sequence[Record]) -> list[str]:
    """Notes about trained rows that differ in cost (including earlier stages) or in the number of images seen."""
    trained = [row for row in rows if row.get("train", {}).get("images_seen")]
    costs = [cost for row in trained if (cost := training_macs(row)) is not None]
    images = sorted({row["train"]["images_seen"] for row in trained})
    notes = []
    if costs and max(costs) > (1 + SAME) * min(costs):
        notes.append(
            f"Not one cost: training took from {min(costs) / PETA:.4g} to {max(costs) / PETA:.4g} PMACs, "
            "earlier stages included."
        )
    if len(costs) < len(trained):
        notes.append(f"Of {len(trained) - len(costs)} of {len(trained)} trained rows the whole cost is not known.")
    if len(images) > 1:
        notes.append(f"Not one budget of images: training saw from {images[0]:,} to {images[-1]:,}.")
    return notes


def uncounted_note(rows: Sequence[Record]) -> str:
    """A note that names the networks whose training no row's cost includes, because others trained them."""
    users: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for name in uncounted_parts(row):
            users[name].append(row["system"]["method"])
    if not users:
        return ""
    parts = [f"{name} ({', '.join(sorted(set(methods)))})" for name, methods in sorted(users.items())]
    return (
        "Training costs hold every stage that was trained here. Not counted, "
        f"because others trained them: {'; '.join(parts)}."
    )


def uncounted_parts(row: Record) -> list[str]:
    """The networks of a row and of its earlier stages that were not trained here."""
    parents = row.get("parents", [])
    ours = {parent["checkpoint_sha256"] for parent in parents}
    parts = [
        *row.get("pretrained_components", []),
        *(part for parent in parents for part in parent.get("pretrained_components", [])),
    ]
    return sorted(
        {
            network_name(part["name"], part["role"])
            for part in parts
            if part["sha256"] is None or part["sha256"] not in ours
        }
    )


def network_name(component: str, role: str) -> str:
    """The usual name of a network.

    Records call EfficientNet-Lite0 `embedded`, and also the autoencoder in the package, whose role is tokenizer.
    """
    return (
        "EfficientNet-Lite0 on ImageNet"
        if component in ("embedded", "EmbeddedDistance") and role != "tokenizer"
        else component
    )


def floor_note(row: Record) -> str:
    """A note with the distance of held-out real images, also converted to the number of generated images."""
    floor, primary = row["metrics"].get("fd_floor"), next((name for name in PRIMARY if name in row["metrics"]), None)
    if not floor or not primary:
        return ""
    weighted = round(floor.get("n_eff", floor["n"]))
    among = f" (their classes weighted alike, which makes them worth {weighted})" if weighted != floor["n"] else ""
    note = f"Floor: {floor['n']} held-out real images{among} in the place of generated ones reach {floor['value']:.2f}"
    if floor.get("value_bc") is not None and floor.get("se") is not None:
        n = row["metrics"][primary]["n"]
        note += (
            f" (bias-corrected {floor['value_bc']:.2f} ± {floor['se']:.2f}), "
            f"which makes {floor_at(floor, n):.2f} for {n} images"
        )
    real = row["metrics"].get("class_accuracy_real")
    return note + (f". Class accuracy of held-out real images: {real['value']:.3f}." if real else ".")


def floor_at(floor: Mapping[str, float], n: int) -> float:
    """The floor for n images by FD(n) = FD(inf) + c / n. Reweighted images count with their effective number."""
    return floor["value_bc"] + (floor["value"] - floor["value_bc"]) * floor.get("n_eff", floor["n"]) / n
