"""Which judges a row has met, and whether it may be ranked. Imports no torch.

A judge is a network whose features a protocol compares. A row that used the same network while it was trained or
sampled, as encoder, teacher or loss, also through an earlier stage, is not ranked by it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pixlat.evaluation.board.entries import Entry
from pixlat.evaluation.metrics.student import NORMAL_QUANTILE
from pixlat.evaluation.protocols.identity import COPY_QUANTILE
from pixlat.evaluation.records.contact import contact_of, judges_of
from pixlat.evaluation.records.record import Record

Judge = Mapping[str, Any]  # id, sha256, ranks: an entry of protocol.judges
Contact = Mapping[str, Any]  # judge, role, component, used_at, via: an entry of a record's contact

NAMES = {"embedded-v1": "EfficientNet-Lite0"}
NOT_KNOWN = "not known"
REMARK = re.compile(r" \([^)]*\)")  # as in "autoencoder32 (in the package)"


def ranked_judges(protocol: Mapping[str, Any]) -> list[Judge]:
    """The judges of a protocol that rank. The one extractor of an earlier or named protocol does."""
    return [judge for judge in judges_of(protocol) if judge.get("ranks", True)]


def judge_name(judge: str) -> str:
    """The usual name of the judge with this id."""
    return NAMES.get(judge, judge)


def contact_with(row: Record) -> tuple[Sequence[Contact], bool]:
    """The judges that a row has met and how, and whether that is all: a network may have no digest in the record.

    It is as recorded, or computed from the digests of the row's networks and of its earlier stages'.
    """
    if "contact" in row or not row["protocol"]:
        return row.get("contact", ()), True
    if "pretrained_components" not in row:
        return (), False
    components, parents, judges = row["pretrained_components"], row.get("parents", []), judges_of(row["protocol"])
    found = contact_of(components, parents, judges)
    return (found, True) if found is not None else (contact_of(*_traceable(components, parents), judges) or (), False)


def _traceable(components: Iterable[Judge], parents: Iterable[Judge]) -> tuple[list[Judge], list[Judge]]:
    """The networks and earlier runs without those that have no digest or name no networks."""
    kept: list[Judge] = []
    for parent in parents:
        networks, runs = _traceable(parent.get("pretrained_components", []), parent.get("parents", []))
        kept.append({**parent, "pretrained_components": networks, "parents": runs})
    return [part for part in components if part["sha256"]], kept


def met_in_ranking(row: Record) -> frozenset[tuple[str, str]]:
    """The ranking judges that a row has met, each with the role."""
    ranking = {judge["id"] for judge in ranked_judges(row["protocol"])}
    return frozenset((each["judge"], each["role"]) for each in contact_with(row)[0] if each["judge"] in ranking)


def contact_text(row: Record) -> str:
    """A text such as "EfficientNet-Lite0: encoder, perceptual loss of autoencoder32", "none" or "not known"."""
    contact, complete = contact_with(row)
    roles: dict[str, list[str]] = defaultdict(list)
    for each in contact:
        stage = REMARK.sub("", each["via"] or "")
        roles[each["judge"]].append(each["role"] + (f" of {stage}" if stage else ""))
    parts = [f"{judge_name(judge)}: {', '.join(dict.fromkeys(found))}" for judge, found in roles.items()]
    return "; ".join(parts) or ("none" if complete else NOT_KNOWN)


def reason_not_ranked(entry: Entry, primary: str) -> str:
    """Why an entry has no rank; empty if it has one."""
    if primary not in entry.row["metrics"]:
        return f"no {primary}" if entry.row["metrics"] else "not evaluated"
    return next((reason for row in entry.rows if (reason := _reason(row))), "")


def _reason(row: Record) -> str:
    found, ranking = (
        {judge for judge, _ in met_in_ranking(row)},
        [each["id"] for each in ranked_judges(row["protocol"])],
    )
    if met := [judge for judge in ranking if judge in found]:
        return f"met {_listed(map(judge_name, met))}"
    if "judges" in row["protocol"] and not contact_with(row)[1]:
        return "not recorded which judges it met"
    if share := share_of_copies(row):
        return f"{100 * share:.0f} % of its images are copies of training images"
    if "judged_by" in row and {*row["judged_by"]} != {*ranking}:
        return f"judged by {_listed(map(judge_name, row['judged_by']))} only"
    return ""


def share_of_copies(row: Record) -> float:
    """The share of copies if it is larger than that of unseen real images at 95 %, else 0."""
    copies = row["metrics"].get("copies")
    if copies and copies["value"] - NORMAL_QUANTILE * (copies.get("se") or 0.0) > COPY_QUANTILE:
        return float(copies["value"])
    return 0.0


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
