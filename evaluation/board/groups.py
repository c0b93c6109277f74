"""Which records meet in one table, and in what order: one section a protocol hash,
guided and unguided rows apart, ranked by one metric.

Imports no torch.
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
# the first of these that a record has ranks it; lower is better in all
PRIMARY = ("fid", "fd_dinov2", "fd_embedded", "rfid", "rfd_embedded")

PETA = 1e15
SAME = 0.01  # costs that differ by less are the same

EMBEDDED_NOTE = "Embedded extractor: compare only inside this project, same hash. Not comparable with Inception FID."


@dataclass(frozen=True)
class Records:
    """What was found below a folder."""

    rows: list[Record]
    left_out: list[str]  # one sentence for each record that is broken or invalid, with its path
    folders: dict[str, Path] = field(default_factory=dict)  # row_id -> where the record's pictures and logs lie
    curves: dict[str, list[CurvePoint]] = field(default_factory=dict)  # row_id -> its scores while it trained
    # the checked claims of papers, with their folders
    claims: list[tuple[ClaimRecord, Path]] = field(default_factory=list)


@dataclass(frozen=True)
class Group:
    """Rows that are ranked together, best first; those without the ranking metric come last and have no rank."""

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
        """Unguided rows, guided ones, those of which nobody knows, and reconstructions: each ranked on its own."""
        return [
            group(chosen, heading)
            for heading in HEADINGS
            if (chosen := [row for row in self.rows if heading_of(row) == heading])
        ]

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing: the extractor's reach, what real images score,
        whether all were trained alike, and what no cost holds.
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
    """Every record below `runs`, hidden folders passed over, with its curve. A copy of a record counts once."""
    found = Records([], [], {}, {})
    for path in sorted(runs.rglob(pattern)):
        if any(part.startswith(".") for part in path.relative_to(runs).parts):
            continue
        try:
            record = read_record(path)
            if record["row_id"] in found.folders:
                continue
            found.rows.append(record)
            found.folders[record["row_id"]] = path.parent
            found.curves[record["row_id"]] = read_curve(path.parent / CURVE)
        except UserError as error:  # a broken record is left out; one with a broken curve goes without
            found.left_out.append(str(error))
    found.claims.extend(read_claims(runs, found.left_out))
    return found


def sections(rows: Sequence[Record]) -> list[Section]:
    """What was scored here, by protocol, the protocol with most rows first, what was not evaluated last."""
    by_hash: dict[str | None, list[Record]] = defaultdict(list)
    for row in rows:
        if row["kind"] != "published":
            by_hash[row["protocol_hash"]].append(row)
    found = [section(chosen) for chosen in by_hash.values()]
    return sorted(found, key=lambda each: (each.protocol_hash is None, -len(each.rows), each.name))


def section(rows: Sequence[Record]) -> Section:
    """One protocol's rows. Rows of several protocols are a ValueError: they must not be ranked together."""
    hashes = {row["protocol_hash"] for row in rows}
    if len(hashes) != 1:
        raise ValueError("one table, one protocol: " + ", ".join(sorted(map(str, hashes))))
    return Section(hashes.pop(), list(rows))


def group(rows: Sequence[Record], heading: str) -> Group:
    """Ranks rows of one protocol; equal scores by name."""
    primary = next((name for name in PRIMARY if any(name in row["metrics"] for row in rows)), "fd_embedded")

    def key(row: Record) -> tuple[bool, float, str]:
        metric = row["metrics"].get(primary)
        return (metric is None, metric["value"] if metric else 0.0, row["name"])

    return Group(heading, primary, sorted(rows, key=key))


def heading_of(row: Record) -> str:
    """The group within its protocol that a row belongs to: guidance of any kind is told apart."""
    if row["protocol"] and row["protocol"]["samples"]["label_law"] == "reconstruction":
        return "Reconstruction"
    if "sampling" not in row:
        return "Guidance not known"
    return "Unguided" if row["sampling"]["guidance"] == "none" else "Guided"


def training_macs(row: Record) -> int | None:
    """The whole price of training in MACs, earlier stages included; None where a part of it is not known."""
    parts = [row.get("train", {}).get("macs_total"), *(parent.get("macs_total") for parent in row.get("parents", []))]
    return None if None in parts else sum(parts)


def budget_notes(rows: Sequence[Record]) -> list[str]:
    """What rows that were trained differ in: the whole cost with its earlier stages, and the images that they saw."""
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
    """Which networks of others the rows were trained with: what their training cost is in no row."""
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
    """The networks of a row, and of the runs that it is built on, that no stage of ours trained."""
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
    """What people call a network of others.

    In records EfficientNet-Lite0 is `embedded`, as the autoencoder in the package is, whose role is tokenizer.
    """
    return (
        "EfficientNet-Lite0 on ImageNet"
        if component in ("embedded", "EmbeddedDistance") and role != "tokenizer"
        else component
    )


def floor_note(row: Record) -> str:
    """What held-out real images reach, also carried to the number of generated images."""
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
    """The floor for n images: FD(n) = FD(inf) + c / n, where reweighted images count as their effective number."""
    return floor["value_bc"] + (floor["value"] - floor["value_bc"]) * floor.get("n_eff", floor["n"]) / n
