"""The notes above a table: what keeps its rows from being compared directly. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pixlat.evaluation.board.standing import judge_name
from pixlat.evaluation.records.record import Record

PETA = 1e15
SAME = 0.01  # costs whose relative difference is smaller count as equal

EMBEDDED_NOTE = "Embedded extractor: compare only inside this project, same hash. Not comparable with Inception FID."


def judges_note(protocol: Mapping[str, Any], primary: str) -> str:
    """What the ranking number means and which judges it is made of; empty for extractors that papers use as well."""
    if "judges" not in protocol:
        return "" if protocol["extractor"]["comparable_with_inception_fid"] else EMBEDDED_NOTE
    ranking, others = (
        ", ".join(judge_name(judge["id"]) for judge in protocol["judges"] if judge["ranks"] is ranks)
        for ranks in (True, False)
    )
    meaning = (
        "fd_ratio: how many times as far the images are from the real ones as real images that nobody has seen; the "
        "larger of the ratios to training and to held-out images, averaged over the ranking judges"
        if primary == "fd_ratio"
        else "Without held-out images there is no ratio to unseen ones. Distances are in the judge's own units"
    )
    shown = f" {others}: shown, ranks nothing." if others else ""
    return f"{meaning}. Judges: {ranking}.{shown} Not comparable with Inception FID."


def training_macs(row: Mapping[str, Any]) -> int | None:
    """The MACs of training, including all earlier stages; None if a part of them is not known."""
    parts = [row.get("train", {}).get("macs_total"), *(stage.get("macs_total") for stage in earlier_stages(row))]
    return None if None in parts else sum(parts)


def earlier_stages(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The runs that a row is built on, and those that they are built on. A run that is met twice is given once."""
    seen: set[str] = set()
    waiting = list(row.get("parents", []))
    while waiting:
        stage = waiting.pop(0)
        waiting += stage.get("parents", [])
        digest = stage.get("checkpoint_sha256")
        if digest not in seen:
            yield stage
        seen |= {digest} - {None}


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
    stages = list(earlier_stages(row))
    ours = {stage["checkpoint_sha256"] for stage in stages}
    parts = [
        *row.get("pretrained_components", []),
        *(part for stage in stages for part in stage.get("pretrained_components", [])),
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


def floor_note(row: Record, primary: str) -> str:
    """A note with the distance of held-out real images, also converted to the number of generated images."""
    floor, ranked = row["metrics"].get("fd_floor"), row["metrics"].get(primary)
    if not floor or not ranked:
        return ""
    weighted = round(floor.get("n_eff", floor["n"]))
    among = f" (their classes weighted alike, which makes them worth {weighted})" if weighted != floor["n"] else ""
    note = f"Floor: {floor['n']} held-out real images{among} in the place of generated ones reach {floor['value']:.2f}"
    if floor.get("value_bc") is not None and floor.get("se") is not None:
        n = ranked["n"]
        note += (
            f" (bias-corrected {floor['value_bc']:.2f} ± {floor['se']:.2f}), "
            f"which makes {floor_at(floor, n):.2f} for {n} images"
        )
    return note + "."


def floor_at(floor: Mapping[str, float], n: int) -> float:
    """The floor for n images by FD(n) = FD(inf) + c / n. Reweighted images count with their effective number."""
    return floor["value_bc"] + (floor["value"] - floor["value_bc"]) * floor.get("n_eff", floor["n"]) / n


def identity_notes(rows: Sequence[Record], hidden: int) -> list[str]:
    """Notes on how records became rows: evaluations that are not shown, and records without a configuration."""
    old = [row for row in rows if "train" in row and "config" not in row]
    return [
        note
        for note, applies in (
            (
                f"{hidden} further evaluations of the same checkpoints with the same settings are not shown; "
                "leaderboard.json has them.",
                hidden,
            ),
            (
                f"{len(old)} of {len(rows)} records do not name their settings. They count as trainings of one "
                "configuration if method, size, training length and sampling are the same.",
                0 < len(old) < len(rows),
            ),
        )
        if applies
    ]
